"""Files that a run never writes, and whose opening may never end."""

import os
from pathlib import Path

from lorax.system.files import CheckpointError
from lorax.system.small_files import special_kind


def refuse_special_files(folder: Path) -> None:
    """Refuses a folder in which, at any depth, there is more than files and folders.

    Raises:
        CheckpointError: Naming all that is something else.
    """
    found = []
    for parent, _, names in os.walk(folder):
        for path in sorted(Path(parent) / name for name in names):
            try:
                kind = special_kind(path.stat().st_mode)
            except OSError:  # a link to nothing, which is told where it is read
                continue
            found += [f"{path} is {kind}"] if kind else []
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise CheckpointError(
            f"{'; '.join(found[:3])}{more}, where a run has only files and folders: remove it"
        )
