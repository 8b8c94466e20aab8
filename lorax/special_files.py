"""Files that a run never writes, and whose opening may never end."""

import os
import stat
from pathlib import Path

from lorax.interop.files import CheckpointError

_KINDS = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def refuse_special_files(folder: Path) -> None:
    """Refuses a folder in which, at any depth, there is more than files and folders.

    To open a FIFO waits for its other end, for ever if there is none.

    Raises:
        CheckpointError: Naming all that is something else.
    """
    found = []
    for parent, _, names in os.walk(folder):
        for path in sorted(Path(parent) / name for name in names):
            try:
                mode = path.stat().st_mode
            except OSError:  # a link to nothing, which is told where it is read
                continue
            found += [f"{path} is {kind}" for is_kind, kind in _KINDS if is_kind(mode)]
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise CheckpointError(
            f"{'; '.join(found[:3])}{more}, where a run has only files and folders: remove it"
        )
