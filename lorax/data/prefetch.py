"""The next batches, made and placed while the current one trains."""

import queue
import threading
from collections.abc import Callable, Generator, Iterator


def prefetch[T, U](
    iterator: Iterator[T], place: Callable[[T], U], depth: int = 2
) -> Generator[U, None, None]:
    """Yields ``place(item)`` for each item, at most `depth` of them made ahead in a thread.

    The thread starts with the first item asked for. It ends with the iterator, at the first
    error, which is raised to the consumer in its turn, and when the consumer stops: when the
    returned generator is closed or collected.

    Args:
        iterator: Is only ever used by the thread.
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
            # Whatever it is, the consumer would wait for ever if it did not get it.
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
