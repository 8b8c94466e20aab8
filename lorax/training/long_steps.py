"""Long steps: a signal drops the running one instead of waiting for it."""

import math
import time
from typing import Any

import jax

from lorax.system.signals import StopAskedError, StopRequest
from lorax.training.step import TrainState

PATIENCE_SECONDS = 2.0
"""How long a run waits for its step after a signal; of the ten seconds the rest is for saving."""

LONG_SECONDS = 2.0
"""A longer step begins only when the one before has ended, and can be dropped."""

LARGEST_BYTES = 2 * 2**30
"""A larger state is not copied before a long step: it could not be written in time either."""


class StepDroppedError(StopAskedError):
    """A signal has requested a stop, and the run does not wait for its step."""


class LongSteps:
    """Keeps the state from before a long step, so that a signal need not wait for its end.

    A step consumes the state it starts from. Before a step that may take longer than
    `LONG_SECONDS`, that state is copied to the host's memory. A step may take that long if the last
    one on rows of the same width did.

    Attributes:
        before: The copy, on one device's share of the host's memory where the state is the same on
            all; None while no long step runs.
    """

    def __init__(self):
        self.before: TrainState | None = None
        self._seconds: dict[int, float] = {}
        self._ended = -math.inf
        self._dropped = False

    def may_come(self, width: int) -> bool:
        """Says whether a step on rows of a width may take long: the last one did, or none ran."""
        return self._seconds.get(width, math.inf) > LONG_SECONDS

    def keep(self, state: TrainState) -> None:
        """Copies the state that the next step consumes, if it is small enough to save at once."""
        self.before = None
        leaves = jax.tree.leaves(state)
        if sum(leaf.nbytes for leaf in leaves) <= LARGEST_BYTES:
            self.before = jax.block_until_ready(jax.tree.map(_copy_to_host, state))

    def wait(self, arrays: Any, width: int, begun: float, stop: StopRequest) -> None:
        """Waits for the results of the running step, and records how long it took.

        Args:
            arrays: Its results.
            width: Width of its rows.
            begun: When it was dispatched, by `time.perf_counter`.
            stop: Checked meanwhile; its `dropped` is set if the step is dropped.

        Raises:
            StepDroppedError: If a signal came `PATIENCE_SECONDS` ago, and there is a copy.
        """
        waited = False
        for _ in stop.hear_while_waiting(arrays):
            waited = True
            if self.before is not None and stop.age() > PATIENCE_SECONDS:
                self._dropped = stop.dropped = True
                raise StepDroppedError(stop.received)
        now = time.perf_counter()
        seconds = now - max(begun, self._ended)
        self._ended = now
        # A step that had ended before the wait gives only an upper bound.
        known = math.inf if waited else self._seconds.get(width, math.inf)
        self._seconds[width] = min(seconds, known)

    def reached(self, state: TrainState) -> TrainState:
        """Returns `state`, or the copy from before if its step was dropped or failed.

        Raises:
            RuntimeError: As JAX does, if the step failed and there is no copy.
        """
        if not self._dropped:
            try:
                return jax.block_until_ready(state)
            except RuntimeError:  # failed, or consumed by a step that failed
                if self.before is None:
                    raise
        assert self.before is not None
        return self.before


def _copy_to_host(leaf: jax.Array) -> jax.Array:
    one = leaf.addressable_data(0) if leaf.is_fully_replicated else leaf
    return jax.device_put(one, one.sharding.with_memory_kind("pinned_host"))
