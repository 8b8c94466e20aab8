"""Steps that take longer than a signal leaves time for: they are dropped, not waited for."""

import math
import time
from typing import Any

import jax

from lorax.system.signals import StopAskedError, StopRequest
from lorax.training.step import TrainState

PATIENCE_SECONDS = 2.0
"""How long the step that runs is waited for after a signal; the rest of ten is for saving."""

LONG_SECONDS = 2.0
"""What takes longer is not begun before the step ahead of it has ended, and can be dropped."""

LARGEST_BYTES = 2 * 2**30
"""A larger state is neither copied before each long step nor written in the seconds there are."""


class StepDroppedError(StopAskedError):
    """A signal has asked the run to stop, and the step that runs is not waited for."""


class LongSteps:
    """Keeps what was before a long step, so that a signal need not wait for its end.

    A step consumes the state it starts from. Before one that may take longer than `LONG_SECONDS`
    that state is copied to the host's memory. Whether it may is told by the last step on rows of
    the same width.

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
        """Says whether a step on rows of a width may take long: if the last did, or none was."""
        return self._seconds.get(width, math.inf) > LONG_SECONDS

    def keep(self, state: TrainState) -> None:
        """Copies what the next step consumes, if it is small enough to be saved at once."""
        self.before = None
        leaves = jax.tree.leaves(state)
        if sum(leaf.nbytes for leaf in leaves) <= LARGEST_BYTES:
            self.before = jax.block_until_ready(jax.tree.map(_copy_to_host, state))

    def wait(self, arrays: Any, width: int, begun: float, stop: StopRequest) -> None:
        """Waits for the results of the step that runs, and notes how long it took.

        Args:
            arrays: Its results.
            width: Of its rows.
            begun: When it was dispatched, by `time.perf_counter`.
            stop: Is heard meanwhile, and told of a step that is dropped.

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
        # Of one that had ended before it was waited for, only a bound is known.
        known = math.inf if waited else self._seconds.get(width, math.inf)
        self._seconds[width] = min(seconds, known)

    def reached(self, state: TrainState) -> TrainState:
        """Returns `state`, or if the step that makes it was dropped or failed, what was before.

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
