"""Refuses special files, which a run never writes and whose opening may never return."""

import os
from pathlib import Path

from lorax.system.files import CheckpointError
from lorax.system.small_files import special_kind


def refuse_special_files(folder: Path) -> None:
    """Refuses a folder that holds, at any depth, anything but files and folders.

    Raises:
        CheckpointError: Naming every special file.
    """
    found = []
    for parent, _, names in os.walk(folder):
        for path in sorted(Path(parent) / name for name in names):
            try:
                kind = special_kind(path.stat().st_mode)
            except OSError:  # a dangling link: its reader reports it
                continue
            found += [f"{path} is {kind}"] if kind else []
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise CheckpointError(
            f"{'; '.join(found[:3])}{more}, where a run has only files and folders: remove it"
        )
