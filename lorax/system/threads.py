"""Background threads. They are daemons: a run that fails does not wait for them."""

import threading
from collections.abc import Callable
from concurrent.futures import Future

_PREFIX = "lorax-background-"

TRACING = threading.Lock()
"""Held while a step is traced: one thread runs Python at a time, and the step takes longest."""


def in_background[T](name: str, work: Callable[[], T]) -> Future[T]:
    """Runs `work` in a thread of its own, and returns its result to come."""
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
    """Waits until threads of that name have done what they were started for."""
    for thread in threading.enumerate():
        if thread.name == _PREFIX + name:
            thread.join()


def works_in_background() -> bool:
    """Says whether such a thread runs: Python's own way out would take its memory away."""
    return any(thread.name.startswith(_PREFIX) for thread in threading.enumerate())
