"""What a step came to: the numbers that a run's listeners are told."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from lorax.data.batches import BatchPlan
from lorax.metrics import Throughput, is_spike
from lorax.system.hardware import memory_gib

type Event = dict[str, Any]


class StepEvents:
    """Describes the steps of a run, and times them.

    Args:
        plan: The run's batches.
        total_steps: Of the run.
        schedule: Learning rate by steps done.
        throughput: Counts what the steps took, and on which devices.
    """

    def __init__(
        self,
        plan: BatchPlan,
        total_steps: int,
        schedule: Callable[[int], Any],
        throughput: Throughput,
    ):
        self.plan, self.total_steps, self.schedule = plan, total_steps, schedule
        self.throughput = throughput
        self._mean_document = len(plan.dataset.tokens) / len(plan.dataset)
        self._tokens: Callable[[int], np.ndarray] = functools.lru_cache(maxsize=2)(plan.tokens)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Says that what took time up to now was no step."""
        self._began = time.perf_counter()

    def describe(
        self,
        step: int,
        epoch: int,
        at: int,
        numbers: Mapping[str, Any],
        losses_before: Sequence[float],
    ) -> Event:
        """Returns the event of a step that has just ended.

        Args:
            step: From 1.
            epoch: From 0.
            at: The step's place in its epoch, from 0.
            numbers: What the step returned, on the host.
            losses_before: Of the steps before it, which tell a spike.
        """
        now = time.perf_counter()
        seconds, self._began = now - self._began, now
        loss, tokens = float(numbers["loss"]), int(self._tokens(epoch)[at])
        speed = self.throughput.add(tokens, seconds, context_tokens=self._mean_document)
        memory = memory_gib(self.throughput.devices)
        event = {
            "step": step,
            "total_steps": self.total_steps,
            "loss": loss,
            "learning_rate": float(self.schedule(step - 1)),
            "grad_norm": float(numbers["grad_norm"]),
            "supervised_tokens": int(numbers["tokens"]),
            "epoch": epoch + 1,
            "tokens": tokens,
            **speed,
            "step_seconds": seconds,
            "memory_gib": memory.gib,
            "memory_of": memory.source,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        if is_spike(loss, losses_before):
            rows = [row for part in self.plan.rows(epoch, at) for row in part]
            event["spike_rows"] = " ".join(map(str, rows))
        return event
