"""Background threads. They are daemons: a run that fails does not wait for them."""

import threading
from collections.abc import Callable
from concurrent.futures import Future

_PREFIX = "lorax-background-"

TRACING = threading.Lock()
"""Held while a step is traced: threads share Python's lock, and tracing takes longest."""


def in_background[T](name: str, work: Callable[[], T]) -> Future[T]:
    """Runs `work` in a background thread, and returns a future of its result."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=_PREFIX + name, daemon=True).start()
    return future


def await_tracing() -> None:
    """Waits while a step is traced."""
    with TRACING:
        pass


def finish_in_background(name: str) -> None:
    """Waits until the background threads of that name have ended."""
    for thread in threading.enumerate():
        if thread.name == _PREFIX + name:
            thread.join()


def works_in_background() -> bool:
    """Says whether a background thread runs: a normal exit of Python would free its memory."""
    return any(thread.name.startswith(_PREFIX) for thread in threading.enumerate())
