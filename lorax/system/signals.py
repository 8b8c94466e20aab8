"""How a run is asked to end before its time: by a signal."""

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
    """A run that was asked to stop and has saved what it had."""


class StopAskedError(Exception):
    """A signal, by whose name it is called, has asked the run to stop."""


def _asking_signals() -> list[signal.Signals]:
    """Returns what asks a run to stop: SIGTERM, SIGINT, and SIGHUP unless it is ignored (nohup)."""
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if is_ignored else [signal.SIGHUP])]


def _await_second() -> None:
    """After a first signal: has another SIGTERM or SIGINT end the process at once.

    Not SIGHUP: a terminal that goes away may send it twice.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


class StopRequest:
    """Whether a signal has asked the run to stop, how long ago, and what that left behind.

    The first SIGTERM or SIGINT, or SIGHUP of a terminal that goes away unless it is ignored, is
    noted while the run listens, for it to save and end; elsewhere it raises `RunStopped`, where
    that is asked for. A second one ends the process at once, in the operating system's way. Only
    the main thread can listen; elsewhere nothing is ever noted.

    Attributes:
        received: The name of the signal that came while the run last listened, if one did.
        dropped: Whether a step was dropped for it: that step still runs, and Python's own way out
            would wait for it.
    """

    def __init__(self):
        self.received: str | None = None
        self.dropped = False
        self._heard: Callable[[], object] = lambda: None
        self._since = 0.0

    def raise_at_once(self) -> None:
        """Has a signal raise `RunStopped` from now on, again if something discards it.

        That is for where there is nothing to save: before and after the run listens.
        """
        for each in _asking_signals():
            signal.signal(each, self._raise)
        # What a callback of the garbage collector raises, and JAX has one, Python only prints.
        sys.unraisablehook = self._raise_again

    @contextlib.contextmanager
    def listening(self, heard: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Listens within the block, and gives the signals back afterwards.

        Args:
            heard: Is called when a signal has come, from its handler.
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
        """Yields now and then until the arrays are there.

        JAX's own waiting is deaf: Python hears of a signal only between its own instructions.
        """
        while not all(leaf.is_ready() for leaf in jax.tree.leaves(arrays)):
            yield
            time.sleep(_POLL_SECONDS)

    def wait(self, arrays: Any) -> None:
        """Waits until the arrays are there.

        Raises:
            StopAskedError: If a signal comes meanwhile: they are not waited for.
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
