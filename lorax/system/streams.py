"""Standard output and error that outlive whoever reads them."""

import errno
import os
from typing import Any, TextIO

_NOBODY_READS = {errno.EPIPE, errno.EIO, errno.ENXIO}


class Outlet:
    """A text stream of the process that goes nowhere once its pipe or terminal is gone.

    A run that lasts a night must not end because ``tee`` or the window did: its numbers are in its
    log, and its end in its exit status. Other errors, such as a full disk, are raised.

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
        """Writes what waits, or drops it."""
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if error.errno not in _NOBODY_READS:
            raise error
        # What Python holds back would raise again, at the latest when the process ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
