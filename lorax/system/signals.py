"""How a run is asked to end before its time: by a signal."""

import contextlib
import os
import signal
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


def asking_signals() -> list[signal.Signals]:
    """Returns what asks a run to stop: SIGTERM, SIGINT, and SIGHUP unless it is ignored (nohup)."""
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if is_ignored else [signal.SIGHUP])]


def await_second() -> None:
    """After a first signal: has another SIGTERM or SIGINT end the process at once.

    Not SIGHUP: a terminal that goes away may send it twice.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


class StopRequest:
    """Whether a signal has asked the run to stop.

    The first SIGTERM or SIGINT, or SIGHUP of a terminal that goes away unless it is ignored, is
    noted, for the run to save and end. A second one ends the process at once, in the operating
    system's way. Only the main thread can listen; elsewhere nothing is ever noted.

    Args:
        heard: Is called when a signal has come, from its handler.
    """

    def __init__(self, heard: Callable[[], object] = lambda: None):
        self._heard = heard
        self.received: str | None = None
        self._since = 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listens within the block, and gives the signals back afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in asking_signals()}
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

    def _note(self, number: int, _: Any) -> None:
        self.received, self._since = signal.Signals(number).name, time.monotonic()
        await_second()
        self._heard()
        message = f"\n{self.received}: saving and stopping; once more stops at once\n"
        with contextlib.suppress(OSError):  # whoever read it may have had the signal too
            os.write(2, message.encode())
