"""The watchdog: ends a run that is stuck."""

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Iterator

STUCK_STATUS = 70  # EX_SOFTWARE


class Watchdog:
    """Ends the process when nothing has happened for too long, and prints every thread's stack.

    Args:
        seconds: The time limit; None waits for ever.
    """

    def __init__(self, seconds: float | None):
        self.seconds = seconds
        self._last = time.monotonic()
        self._ended = threading.Event()

    def beat(self) -> None:
        """Restarts the time limit."""
        self._last = time.monotonic()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watches within the block."""
        self.beat()
        self._ended.clear()
        thread = None
        if self.seconds is not None:
            thread = threading.Thread(target=self._watch, name="lorax-watchdog", daemon=True)
            thread.start()
        try:
            yield
        finally:
            self._ended.set()
            if thread is not None:
                thread.join()

    def _watch(self) -> None:
        assert self.seconds is not None
        while not self._ended.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self._last > self.seconds:
                try:
                    message = (
                        f"lorax: no step has ended for {self.seconds:g} s "
                        "(train.stuck_after_seconds); the stacks of all threads follow. The "
                        "checkpoints saved before are whole: go on with --resume\n"
                    )
                    # Not through sys.stderr, which may be no file, or be locked by the stuck
                    # thread.
                    with contextlib.suppress(OSError):
                        os.write(2, message.encode())
                    faulthandler.dump_traceback(2, all_threads=True)
                finally:
                    os._exit(STUCK_STATUS)
