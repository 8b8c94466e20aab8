"""Work beside the run, in threads that do not keep the process from ending."""

import threading
from collections.abc import Callable
from concurrent.futures import Future

_PREFIX = "lorax-beside-"

TRACING = threading.Lock()
"""Held while a step is traced: one thread runs Python at a time, and the step takes longest."""


def start_beside[T](name: str, work: Callable[[], T]) -> Future[T]:
    """Returns the result to come of `work`, which a thread of its own does."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    # A daemon, so that a run that fails meanwhile need not wait for it.
    threading.Thread(target=run, name=_PREFIX + name, daemon=True).start()
    return future


def await_tracing() -> None:
    """Waits while a step is traced."""
    with TRACING:
        pass


def finish_beside(name: str) -> None:
    """Waits until threads of that name have done what they were started for."""
    for thread in threading.enumerate():
        if thread.name == _PREFIX + name:
            thread.join()


def works_beside() -> bool:
    """Says whether such work goes on: Python's own way out would take its memory from under it."""
    return any(thread.name.startswith(_PREFIX) for thread in threading.enumerate())
