"""JSON and safetensors files, read with suspicion and written whole or not at all."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import secrets
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lorax.small_files import MOST_BYTES, SmallFileError, read_small_file
from lorax.wording import clip, explain, kind_of, show

READABLE_DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
"""By the name that safetensors gives them."""

MAX_HEADER_BYTES = 2**24
"""Of a safetensors file: room for 100,000 tensors. A larger one takes long to parse, and memory."""

MAX_INDEX_BYTES = 2**25
"""Of a JSON file that lists tensors: as `MAX_HEADER_BYTES`."""

_READERS = 2
"""Threads that read weights."""


class CheckpointError(ValueError):
    """A file of a checkpoint that cannot be read as it stands, or a folder not to be written."""


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """What a safetensors header says about one tensor.

    Attributes:
        file: Where it is.
        shape: Its shape there.
        dtype: Its dtype as safetensors names it, one of `READABLE_DTYPES`.
        offset: Byte of the file at which its data begin.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int


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


def read_headers(paths: Iterable[Path]) -> dict[str, TensorEntry]:
    """Returns the tensors of some safetensors files by name, without reading their data.

    Raises:
        CheckpointError: If a file is absent, a stand-in, truncated or not safetensors, a tensor
            has a dtype that lorax does not read, or two files hold the same tensor.
    """
    entries: dict[str, TensorEntry] = {}
    for path in paths:
        with open_tensors(path) as file:
            offsets = _read_offsets(path)  # as the library has checked them
            for name in file.keys():
                header = file.get_slice(name)
                shape, dtype = tuple(header.get_shape()), header.get_dtype()
                entry = TensorEntry(path, shape, dtype, offsets[name])
                if entry.dtype not in READABLE_DTYPES:
                    raise CheckpointError(
                        f"{path}: {name} has dtype {entry.dtype}; lorax reads "
                        f"{', '.join(READABLE_DTYPES)}: convert or dequantise it first"
                    )
                if name in entries:
                    raise CheckpointError(
                        f"{name} stands in {entries[name].file} and again in {path}; remove one"
                    )
                entries[name] = entry
    return entries


def read_tensors(paths: Iterable[Path]) -> Iterator[tuple[Path, str, np.ndarray]]:
    """Yields (file, name, value) of every tensor, holding one value at a time.

    Raises:
        CheckpointError: As `read_headers`, before the first value is read.
    """
    for name, entry in read_headers(paths).items():
        yield entry.file, name, read_tensor(entry)


def read_tensor(entry: TensorEntry) -> np.ndarray:
    """Reads one tensor, without Python's lock: other threads run meanwhile.

    Raises:
        CheckpointError: If the file has become shorter.
    """
    value = np.empty(entry.shape, READABLE_DTYPES[entry.dtype])
    left = memoryview(value.reshape(-1).view(np.uint8))
    with entry.file.open("rb", buffering=0) as raw:
        raw.seek(entry.offset)
        while left:
            if not (count := raw.readinto(left)):
                raise CheckpointError(f"{entry.file} was cut off while it was read; fetch it again")
            left = left[count:]
    return value


def read_ahead(entries: Mapping[str, TensorEntry]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields name and value of every tensor as they follow each other in the files.

    The next ones are read in threads meanwhile.

    Raises:
        CheckpointError: As `read_tensor`.
    """
    ahead: deque[tuple[str, Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(_READERS, thread_name_prefix="lorax-read") as pool:
        try:
            for name in sorted(entries, key=lambda n: (entries[n].file, entries[n].offset)):
                ahead.append((name, pool.submit(read_tensor, entries[name])))
                if len(ahead) > _READERS:
                    done, value = ahead.popleft()
                    yield done, value.result()
            while ahead:
                done, value = ahead.popleft()
                yield done, value.result()
        finally:
            for _, value in ahead:
                value.cancel()


def _read_offsets(path: Path) -> dict[str, int]:
    """Returns where in a whole safetensors file the data of each tensor begin."""
    with path.open("rb") as raw:
        size = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(size))
    header.pop("__metadata__", None)
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items()}


@contextlib.contextmanager
def open_tensors(path: str | Path) -> Iterator[Any]:
    """Opens a safetensors file for numpy.

    Raises:
        CheckpointError: If it is absent, a stand-in, truncated or not safetensors.
    """
    path = Path(path)
    refuse_stand_ins(path)
    with path.open("rb") as raw:
        header = int.from_bytes(raw.read(8), "little")
    if header > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} is not a safetensors file that lorax reads: its header would have {header:,} "
            f"bytes, more than {MAX_HEADER_BYTES:,}; fetch it again"
        )
    try:
        file = safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({clip(str(error))}); it may be truncated: "
            "fetch it again"
        ) from None
    with file:
        yield file


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


def save_tensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Writes a safetensors file that whoever may read the folder can read.

    Raises:
        OSError: If the disk has no room for it.
    """
    size = sum(value.nbytes for value in tensors.values())
    if size > (free := shutil.disk_usage(path.parent).free):
        room = f"{size / 2**20:,.1f} MiB are needed and {free / 2**20:,.1f} MiB are free"
        raise OSError(errno.ENOSPC, f"no space left on the disk: {room}", str(path))
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if found := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise
    # safetensors makes its files for the owner alone; a server often runs as someone else.
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


@contextlib.contextmanager
def write_directory(directory: str | Path) -> Iterator[Path]:
    """Gives a fresh folder beside `directory` that takes its place when the block ends.

    What was written is on the disk before it gets its name, so that a power cut leaves the whole
    folder or none. If the block raises, the fresh folder is removed and `directory` is as before.

    Raises:
        CheckpointError: If `directory` exists and is not an empty folder.
    """
    directory = Path(directory)
    refuse_occupied(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = directory.parent / f".{directory.name}.{secrets.token_hex(4)}.partial"
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
    """Raises `CheckpointError` if something is where a folder is to be written."""
    refuse_nul(directory)
    directory = Path(directory)
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists() or directory.is_symlink():
        raise CheckpointError(f"{directory} exists and is not an empty folder; choose another path")
    above = next(path for path in directory.absolute().parents if path.exists())
    if not above.is_dir():
        raise CheckpointError(f"{directory} would lie below {above}, a file; choose another path")
