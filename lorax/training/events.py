"""Metrics of a step: tokens per second, model FLOPs, and the events for listeners."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import jax
import numpy as np
from flax import nnx

from lorax.adapters.nnx.tree import adapted_layers, named_modules
from lorax.objectives.objective import RESERVED
from lorax.system.hardware import Device, memory_gib, peak_bf16_tflops
from lorax.training.course import Course, Position


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSize:
    """The sizes that a model's FLOPs depend on.

    Attributes:
        frozen_parameters: Entries of frozen weight matrices, without an embedding table that is
            only looked up (a tied one is the head's matrix and counts).
        trained_parameters: Entries of trained weight matrices: the adapter's, or all.
        layers: Number of layers.
        attention_width: Heads times head dimension.
    """

    frozen_parameters: int
    trained_parameters: int
    layers: int
    attention_width: int

    def flops_per_token(self, context_tokens: float) -> float:
        """Returns ``4·N_frozen + 6·N_trained + 12·L·H·T``, forward and backward pass.

        A trained matrix takes 2 FLOPs per entry forward, 2 for the gradient of its input and 2 for
        its own; a frozen one has no gradient of its own. Attention has no weights, so it costs the
        same in both. As in the source, the causal mask saves nothing, and recomputation does not
        count.

        Args:
            context_tokens: T, the length of the documents.

        Source: Chowdhery et al. 2022, "PaLM", appendix B, https://arxiv.org/abs/2204.02311
        """
        matrices = 4 * self.frozen_parameters + 6 * self.trained_parameters
        return matrices + 12 * self.layers * self.attention_width * context_tokens


class Throughput:
    """Tokens per second and model FLOPs utilisation of a run, without the steps that compile."""

    def __init__(self, size: ModelSize, devices: Sequence[Device] | None = None):
        """Starts to count; without `devices`, for all devices of the process's backend."""
        devices = jax.devices() if devices is None else devices
        peaks = [peak_bf16_tflops(device.device_kind) for device in devices]
        self.size = size
        self.devices = devices
        self.peak_flops = None if None in peaks else 1e12 * sum(filter(None, peaks))
        self._steps = 0
        self._tokens = 0
        self._seconds = 0.0
        self._flops = 0.0

    def add(
        self, tokens: int, seconds: float, *, context_tokens: float, compiled: bool = False
    ) -> dict[str, float | None]:
        """Counts one step; the mean leaves out the first one and those that are `compiled`.

        Args:
            tokens: Tokens of the step on all devices, without padding.
            seconds: How long the step took, its result waited for.
            context_tokens: Mean length of the documents of the step.
            compiled: Whether the step was compiled within `seconds`.

        Returns:
            The step's own `tokens_per_s` and `mfu` (None where the device's peak is unknown).
        """
        if seconds <= 0:
            raise ValueError(f"a step needs seconds > 0, got {seconds}")
        flops = tokens * self.size.flops_per_token(context_tokens)
        if self._steps > 0 and not compiled:
            self._tokens += tokens
            self._seconds += seconds
            self._flops += flops
        self._steps += 1
        return {"tokens_per_s": tokens / seconds, "mfu": self._mfu(flops, seconds)}

    def mean(self) -> dict[str, float | None]:
        """Returns `tokens_per_s` and `mfu` over all counted steps; None before the first."""
        if self._seconds == 0.0:
            return {"tokens_per_s": None, "mfu": None}
        speed = self._tokens / self._seconds
        return {"tokens_per_s": speed, "mfu": self._mfu(self._flops, self._seconds)}

    def _mfu(self, flops: float, seconds: float) -> float | None:
        return None if self.peak_flops is None else flops / (seconds * self.peak_flops)


def is_spike(loss: float, before: Sequence[float]) -> bool:
    """Says whether a loss is a spike: six standard deviations and a tenth above the mean.

    Args:
        loss: Loss of a step.
        before: Losses of the steps before it; with fewer than twenty no loss is a spike.
    """
    if not math.isfinite(loss) or len(before) < 20:
        return False
    mean = sum(before) / len(before)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in before) / len(before))
    return loss > mean + 6 * deviation and loss > 1.1 * mean


type Event = dict[str, Any]


class StepEvents:
    """Describes the steps of a run, and times them.

    Args:
        course: The course of the run.
        throughput: Counts the seconds of the steps, for the devices of the run.
    """

    def __init__(self, course: Course, throughput: Throughput):
        self.course = course
        self.throughput = throughput
        batches = course.batches
        self._mean_document = len(batches.dataset.tokens) / len(batches.dataset)
        self._tokens: Callable[[int], np.ndarray] = functools.lru_cache(maxsize=2)(batches.tokens)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Restarts the clock: the time up to now was not spent on a step."""
        self._began = time.perf_counter()

    def describe(
        self, at: Position, numbers: Mapping[str, Any], losses_before: Sequence[float]
    ) -> Event:
        """Returns the event of a step that has just ended.

        Args:
            at: The step.
            numbers: The metrics of the step, on the host.
            losses_before: Losses of the steps before it, to recognise a spike.
        """
        now = time.perf_counter()
        seconds = now - self._began
        self._began = now
        loss = float(numbers["loss"])
        tokens = int(self._tokens(at.epoch)[at.at])
        speed = self.throughput.add(tokens, seconds, context_tokens=self._mean_document)
        memory = memory_gib(self.throughput.devices)
        event = {
            "step": at.step,
            "total_steps": self.course.total_steps,
            "loss": loss,
            **{name: float(x) for name, x in numbers.items() if name not in RESERVED},
            "learning_rate": float(np.asarray(self.course.schedule(at.step - 1))),
            "grad_norm": float(numbers["grad_norm"]),
            "supervised_tokens": int(numbers["tokens"]),
            "epoch": at.epoch + 1,
            "tokens": tokens,
            **speed,
            "step_seconds": seconds,
            "memory_gib": memory.gib,
            "memory_of": memory.source,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        if is_spike(loss, losses_before):
            rows = [row for part in self.course.batches.rows(at.epoch, at.at) for row in part]
            event["spike_rows"] = " ".join(map(str, rows))
        return event


def model_size(model: Any) -> ModelSize:
    """Counts the weight matrices of a `lorax.models.decoder.CausalLM`, for its FLOPs per token."""
    trained = frozen = 0
    for module in named_modules(model).values():
        for name, value in vars(module).items():
            matrix = value.get_value() if isinstance(value, nnx.Variable) else None
            if matrix is None or len(matrix.shape) < 2:
                continue
            if name == "embedding" and not model.config.tie_word_embeddings:
                continue  # only looked up
            if isinstance(value, nnx.Param):
                trained += math.prod(matrix.shape)
            else:
                frozen += math.prod(matrix.shape)
    for layer in adapted_layers(model).values():
        only_looked_up = layer.linear_map.kind == "lookup" and not model.config.tie_word_embeddings
        for name, about in layer.adapter.spec.method.parameters.items():
            if len(about.axes) > 1 and not (only_looked_up and "k" in about.axes):
                trained += math.prod(layer.adapter.params[name].shape)
    config = model.config
    return ModelSize(
        frozen_parameters=frozen,
        trained_parameters=trained,
        layers=config.num_hidden_layers,
        attention_width=config.num_attention_heads * config.head_dim,
    )
