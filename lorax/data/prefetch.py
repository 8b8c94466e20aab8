"""Building and placing the next batches while the current one trains."""

import queue
import threading
from collections.abc import Callable, Generator, Iterator


def prefetch[T, U](
    iterator: Iterator[T], place: Callable[[T], U], depth: int = 2
) -> Generator[U, None, None]:
    """Yields ``place(item)`` for each item; a background thread runs at most `depth` items ahead.

    The thread starts with the first item requested. It ends with the iterator, at the first error,
    which the consumer gets in order, and when the returned generator is closed or collected.

    Args:
        iterator: Only the thread uses it.
        place: Such as a transfer to the devices.
        depth: Items ready and not yet consumed, at least 1.

    Raises:
        ValueError: If `depth` is below 1.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    return _consume(iterator, place, depth)


def _consume[T, U](
    iterator: Iterator[T], place: Callable[[T], U], depth: int
) -> Generator[U, None, None]:
    ready: queue.SimpleQueue[tuple[U] | BaseException | None] = queue.SimpleQueue()
    free = threading.Semaphore(depth)
    stopped = threading.Event()

    def work() -> None:
        try:
            while True:
                free.acquire()
                if stopped.is_set():
                    return
                try:
                    item = next(iterator)
                except StopIteration:
                    ready.put(None)
                    return
                ready.put((place(item),))
        except BaseException as error:
            # Any error: the consumer would wait for ever without it.
            ready.put(error)

    thread = threading.Thread(target=work, name="lorax-prefetch", daemon=True)
    thread.start()
    try:
        while (result := ready.get()) is not None:
            if isinstance(result, BaseException):
                raise result
            free.release()
            yield result[0]
    finally:
        stopped.set()
        free.release()
        thread.join()
