"""Standard output and error that survive the loss of their reader."""

import errno
import os
from typing import Any, TextIO

_NOBODY_READS = {errno.EPIPE, errno.EIO, errno.ENXIO}


class Outlet:
    """A text stream of the process that drops its text once its pipe or terminal is gone.

    A long run must not end because ``tee`` or the terminal did: its metrics are in its log, and its
    result is its exit code. Other errors, such as a full disk, are raised.

    Args:
        stream: The stream.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes text, or drops it."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        """Writes buffered text, or drops it."""
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if error.errno not in _NOBODY_READS:
            raise error
        # Python's buffered text would raise later, at the latest when the process ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
