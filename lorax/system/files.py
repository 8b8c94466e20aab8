"""Reading JSON files with checks; writing files and folders whole or not at all."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorax.system.small_files import MOST_BYTES, SmallFileError, read_small_file
from lorax.system.wording import explain, kind_of, show

MAX_INDEX_BYTES = 2**25
"""Largest JSON file that lists tensors; compare `MAX_HEADER_BYTES`."""


class CheckpointError(ValueError):
    """A file of a checkpoint that cannot be read, or a folder that must not be written."""


def read_json(path: str | Path, most: int = MOST_BYTES) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Args:
        path: The file.
        most: Bytes above which it is not read.

    Raises:
        CheckpointError: If the file is absent, too large, a Git LFS pointer or a web page, is not
            UTF-8 JSON, holds anything but an object, or gives a key twice.
    """
    path = Path(path)
    refuse_stand_ins(path)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        for key in result if len(result) < len(pairs) else ():
            if sum(k == key for k, _ in pairs) > 1:
                raise CheckpointError(f"{path}: the key {show(key)} is given twice")
        return result

    try:
        text = read_small_file(path, most).decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique)
    except SmallFileError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; fetch it again") from error
    except CheckpointError:
        raise
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise CheckpointError(f"{path} is not JSON: byte 0x{byte:02x} is no UTF-8") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {explain(error)}") from None
    except RecursionError:
        raise CheckpointError(f"{path} is not JSON of a model: it is nested too deeply") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold an object, got {kind_of(value)}")
    return value


def refuse_stand_ins(path: Path) -> None:
    """Refuses what downloads leave in the place of a file."""
    refuse_nul(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist, or is not a file")
    try:
        with path.open("rb") as file:
            head = file.read(256).lstrip()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {explain(error)}") from error
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"
        )
    if head[:2].lower() in (b"<!", b"<h", b"<?"):
        raise CheckpointError(f"{path} is a web page, not the file itself; fetch it again")


def refuse_nul(path: str | Path) -> None:
    """Raises `CheckpointError` if a path holds a NUL character, which the system's cannot."""
    if "\0" in str(path):
        raise CheckpointError(f"{show(str(path))} holds a NUL character, which no path can")


@contextlib.contextmanager
def write_folder(directory: str | Path, *, partial: str | None = None) -> Iterator[Path]:
    """Gives a fresh folder next to `directory`, and renames it to `directory` when the block ends.

    The files are on the disk before the rename, so that a power cut leaves the whole folder or
    none. If the block raises, the fresh folder is removed and `directory` is unchanged.

    Args:
        directory: The final path.
        partial: Name of the fresh folder, used by nothing else.

    Raises:
        CheckpointError: If `directory` exists and is not an empty folder.
    """
    directory = Path(directory)
    refuse_occupied(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    name = partial or f".{directory.name}.{secrets.token_hex(4)}.partial"
    fresh = directory.parent / name
    fresh.mkdir()
    try:
        yield fresh
        refuse_occupied(directory)
        sync_tree(fresh)
        os.replace(fresh, directory)  # an empty folder gives way, a full one raises
        sync(directory.parent)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def write_file(path: Path, data: str | bytes) -> None:
    """Writes a file whole or not at all: the old one stays until the new one is on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
    sync(partial)
    os.replace(partial, path)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Waits until a folder and all in it are on the disk."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(parent) / name)
        sync(Path(parent))


def refuse_occupied(directory: str | Path) -> None:
    """Raises `CheckpointError` if the path of a new folder is occupied."""
    refuse_nul(directory)
    directory = Path(directory)
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists() or directory.is_symlink():
        raise CheckpointError(f"{directory} exists and is not an empty folder; choose another path")
    above = next(path for path in directory.absolute().parents if path.exists())
    if not above.is_dir():
        raise CheckpointError(f"{directory} would lie below {above}, a file; choose another path")
