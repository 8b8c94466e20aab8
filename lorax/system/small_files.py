"""Reading small files whole: regular files only, up to a limit."""

import errno
import os
import stat
from pathlib import Path

from lorax.system.wording import explain

MOST_BYTES = 2**20
"""Limit for a file that describes a run, a model or an adapter; real ones have a few kilobytes."""


_SPECIAL = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class SmallFileError(ValueError):
    """The reason why a file is not read; the caller adds its name."""


def special_kind(mode: int) -> str | None:
    """Returns the kind of a path that is neither file, folder nor link, by its `st_mode`.

    Opening one may never return: a FIFO waits for its other end.
    """
    return next((kind for is_kind, kind in _SPECIAL if is_kind(mode)), None)


def read_small_file(path: str | os.PathLike[str], most: int = MOST_BYTES) -> bytes:
    """Returns all bytes of a file.

    A device or a pipe might never end, so it is not even opened.

    Args:
        path: The file.
        most: Bytes above which it is refused.

    Raises:
        SmallFileError: With the reason, without the file's name.
    """
    try:
        status = Path(path).stat()
        if stat.S_ISDIR(status.st_mode):
            raise SmallFileError(os.strerror(errno.EISDIR))
        if not stat.S_ISREG(status.st_mode):
            kind = special_kind(status.st_mode) or "something else"
            raise SmallFileError(f"it is {kind}, not a file on a disk")
        with Path(path).open("rb") as file:
            data = file.read(most + 1)  # what the system makes up as it is read has no size before
    except (OSError, ValueError) as error:
        if isinstance(error, SmallFileError):
            raise
        raise SmallFileError(explain(error)) from error
    if len(data) > most:
        size = max(status.st_size, len(data))
        raise SmallFileError(
            f"it has {size / 2**20:,.0f} MiB, where {most / 2**20:,.0f} would be much: it is "
            "something else"
        )
    return data
