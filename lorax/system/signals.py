"""Signals that ask a run to stop."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

STOPPED_STATUS = 75  # EX_TEMPFAIL: try again, which `--resume` does

_POLL_SECONDS = 0.0005


class RunStopped(KeyboardInterrupt):
    """A run was asked to stop, and has saved."""


class StopAskedError(Exception):
    """A signal has asked the run to stop; the argument is its name."""


def _asking_signals() -> list[signal.Signals]:
    """Returns the signals that ask a run to stop: SIGTERM, SIGINT, and SIGHUP unless ignored."""
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if is_ignored else [signal.SIGHUP])]


def _await_second() -> None:
    """After a first signal: lets another SIGTERM or SIGINT end the process at once.

    Not SIGHUP: a terminal that goes away may send it twice.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


class StopRequest:
    """A request to stop by a signal: whether it came, how long ago, whether a step was dropped.

    The first SIGTERM or SIGINT, or SIGHUP unless it is ignored, is recorded while the run listens,
    so that the run saves and ends. At other times it raises `RunStopped`, if `raise_at_once` was
    called. A second one ends the process at once by the operating system's default. Only the main
    thread can listen; in other threads no signal is ever recorded.

    Attributes:
        received: The name of the signal that came while the run last listened, if one did.
        dropped: Whether a step was dropped for it: that step still runs, and a normal exit of
            Python would wait for it.
    """

    def __init__(self):
        self.received: str | None = None
        self.dropped = False
        self._heard: Callable[[], object] = lambda: None
        self._since = 0.0

    def raise_at_once(self) -> None:
        """Lets a signal raise `RunStopped` from now on, repeatedly if something discards it.

        For the time before and after the run listens, when there is nothing to save.
        """
        for each in _asking_signals():
            signal.signal(each, self._raise)
        # Python only prints an error of a garbage collector's callback, and JAX has such a
        # callback.
        sys.unraisablehook = self._raise_again

    @contextlib.contextmanager
    def listening(self, heard: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Listens within the block, and restores the signals' handlers afterwards.

        Args:
            heard: Called from the signal's handler.
        """
        self.received = None
        self._heard = heard
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in _asking_signals()}
        try:
            yield
        finally:
            if self.received:
                before.pop(signal.SIGHUP, None)  # the second one may still come
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """Raises `StopAskedError` if a signal has come."""
        if self.received:
            raise StopAskedError(self.received)

    def age(self) -> float:
        """Returns the seconds since a signal has come, 0 if none has."""
        return time.monotonic() - self._since if self.received else 0.0

    def hear_while_waiting(self, arrays: Any) -> Iterator[None]:
        """Yields periodically until the arrays are ready.

        JAX's own wait blocks signals: Python handles a signal only between its own instructions.
        """
        while not all(leaf.is_ready() for leaf in jax.tree.leaves(arrays)):
            yield
            time.sleep(_POLL_SECONDS)

    def wait(self, arrays: Any) -> None:
        """Waits until the arrays are ready.

        Raises:
            StopAskedError: If a signal comes meanwhile; the wait then ends.
        """
        for _ in self.hear_while_waiting(arrays):
            self.check()

    def _note(self, number: int, _: Any) -> None:
        self.received = signal.Signals(number).name
        self._since = time.monotonic()
        _await_second()
        self._heard()
        message = f"\n{self.received}: saving and stopping; once more stops at once\n"
        with contextlib.suppress(OSError):  # whoever read it may have had the signal too
            os.write(2, message.encode())

    def _raise(self, number: int, _: Any) -> None:
        _await_second()
        name = signal.Signals(number).name
        what = "while it did not train; what was saved, if any, is whole"
        raise RunStopped(f"stopped by {name} {what}")

    def _raise_again(self, unraisable: Any) -> None:
        stopped = unraisable.exc_value
        if not isinstance(stopped, RunStopped):
            sys.__unraisablehook__(unraisable)
            return

        def again(*_: object) -> None:
            raise RunStopped(*stopped.args)

        signal.signal(signal.SIGALRM, again)
        signal.setitimer(signal.ITIMER_REAL, 0.01)
