"""Safetensors files: headers, tensors one by one or ahead, and a file written."""

import contextlib
import dataclasses
import errno
import json
import os
import re
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

from lorax.system.files import CheckpointError, refuse_stand_ins
from lorax.system.wording import clip

READABLE_DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
"""By the name that safetensors gives them."""

MAX_HEADER_BYTES = 2**24
"""Of a safetensors file: room for 100,000 tensors. A larger one takes long to parse, and memory."""

_READERS = 2
"""Threads that read weights."""


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
