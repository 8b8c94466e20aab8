"""Steps that take longer than a signal leaves time for: they are dropped, not waited for."""

from typing import Any

import jax

from lorax.step import TrainState
from lorax.stopping import StopAskedError, StopRequest

PATIENCE_SECONDS = 4.0
"""How long the step that runs is waited for after a signal; the rest of ten is for saving."""

LONG_SECONDS = 2.5
"""What takes longer is not begun before the step ahead of it has ended, and can be dropped."""

_LARGEST_BYTES = 4 * 2**30
"""A larger state is neither copied before each long step nor saved in the seconds there are."""


class StepDroppedError(StopAskedError):
    """A signal has asked the run to stop, and the step that runs is not waited for."""


class LongSteps:
    """Keeps what was before a long step, so that a signal need not wait for its end.

    A step consumes the state it starts from. Before one that may take longer than `LONG_SECONDS`
    that state is copied to the host's memory, which takes some 20 ms for the adapter of an 8B model
    on an H200's bus. Whether it may is told by the last step on rows of the same width.

    Attributes:
        before: The copy, or None while no long step runs.
    """

    def __init__(self):
        self.before: TrainState | None = None
        self._dropped = False
        self._seconds: dict[int, float] = {}

    def note(self, width: int, seconds: float) -> None:
        """Notes how long a step on rows of a width took."""
        self._seconds[width] = seconds

    def may_come(self, width: int) -> bool:
        """Says whether a step on rows of a width may take long: if the last did, or none was."""
        return self._seconds.get(width, LONG_SECONDS + 1) > LONG_SECONDS

    def keep(self, state: TrainState) -> None:
        """Copies what the next step consumes, if it is small enough to be saved at once."""
        self.before = None
        leaves = jax.tree.leaves(state)
        if sum(leaf.nbytes for leaf in leaves) <= _LARGEST_BYTES:
            on_host = lambda leaf: leaf.sharding.with_memory_kind("pinned_host")
            self.before = jax.device_put(state, jax.tree.map(on_host, state))
            jax.block_until_ready(self.before)

    def wait(self, arrays: Any, stop: StopRequest) -> None:
        """Waits for the results of the step that runs.

        Raises:
            StepDroppedError: If a signal came `PATIENCE_SECONDS` ago, and there is a copy.
        """
        for _ in stop.hear_while_waiting(arrays):
            if self.before is not None and stop.age() > PATIENCE_SECONDS:
                self._dropped = True
                raise StepDroppedError(stop.received)

    def reached(self, state: TrainState) -> TrainState:
        """Returns `state`, or if the step that makes it was dropped, what was before."""
        if not self._dropped:
            return state
        assert self.before is not None
        return self.before
