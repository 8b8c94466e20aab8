"""Safetensors files: reading headers and tensors, also ahead, and writing."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lorax.system.files import CheckpointError, refuse_stand_ins
from lorax.system.wording import clip

type Part = tuple[slice, ...]
"""A part of a tensor: slices without steps of its first dimensions, all of the others."""

READABLE_DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
"""Dtypes by their names in safetensors."""

PACKED_DTYPES = {"U8": np.uint8, "I8": np.int8}
"""Dtypes of the codes and descriptions of quantised matrices."""

MAX_HEADER_BYTES = 2**24
"""Largest header: room for 100,000 tensors. A larger one takes long to parse, and memory."""

_READERS = 2
"""Threads that read weights."""


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """A tensor's entry in a safetensors header.

    Attributes:
        file: The file.
        shape: Its shape there.
        dtype: Its dtype as safetensors names it, of `READABLE_DTYPES` or `PACKED_DTYPES`.
        offset: Byte of the file at which its data begin.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int

    def read(self, parts: Sequence[Part]) -> "list[np.ndarray]":
        """Reads parts of the tensor; see `read_parts`."""
        return read_parts(self, parts)


class Readable(Protocol):
    """What `read_ahead` reads: a tensor, or several that belong together."""

    @property
    def file(self) -> Path:
        """Its file."""
        ...

    @property
    def offset(self) -> int:
        """Byte of the file at which its data begin."""
        ...

    def read(self, parts: Sequence[Part]) -> Any:
        """Reads parts of it."""
        ...


def read_headers(paths: Iterable[Path], *, packed: bool = False) -> dict[str, TensorEntry]:
    """Returns the tensors of some safetensors files by name, without reading their data.

    Args:
        paths: The files.
        packed: Whether their dtypes may be of `PACKED_DTYPES`.

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
                shape = tuple(header.get_shape())
                dtype = header.get_dtype()
                entry = TensorEntry(path, shape, dtype, offsets[name])
                if not (dtype in READABLE_DTYPES or (packed and dtype in PACKED_DTYPES)):
                    raise unreadable(name, entry)
                if name in entries:
                    raise CheckpointError(
                        f"{name} is in {entries[name].file} and in {path}; remove one"
                    )
                entries[name] = entry
    return entries


def unreadable(name: str, entry: TensorEntry) -> CheckpointError:
    """Returns the error of a tensor whose dtype lorax does not read."""
    return CheckpointError(
        f"{entry.file}: {name} has dtype {entry.dtype}; lorax reads "
        f"{', '.join(READABLE_DTYPES)}: convert or dequantise it first"
    )


def read_tensors(paths: Iterable[Path]) -> Iterator[tuple[Path, str, np.ndarray]]:
    """Yields (file, name, value) of every tensor, holding one value at a time.

    Raises:
        CheckpointError: As `read_headers`, before the first value is read.
    """
    for name, entry in read_headers(paths).items():
        yield entry.file, name, read_tensor(entry)


def read_tensor(entry: TensorEntry) -> np.ndarray:
    """Reads one tensor without holding Python's lock.

    Raises:
        CheckpointError: If the file has become shorter.
    """
    return _read_range(entry, 0, math.prod(entry.shape)).reshape(entry.shape)


def read_parts(entry: TensorEntry, parts: Sequence[Part]) -> list[np.ndarray]:
    """Reads parts of one tensor, as `read_tensor` does.

    A part that is contiguous in the file is read alone. Other parts are views of the smallest range
    that covers them, which is read once: the columns of a matrix that is stored row by row, for
    example.

    Raises:
        CheckpointError: As `read_tensor`.
    """
    ranges = [_range_of(part, entry.shape) for part in parts]
    values = []
    scattered = [found for found in ranges if found.stop - found.start > math.prod(found.shape)]
    first = min((found.start for found in scattered), default=0)
    cover = _read_range(entry, first, max((found.stop for found in scattered), default=0))
    strides = [cover.itemsize * math.prod(entry.shape[i + 1 :]) for i in range(len(entry.shape))]
    for found in ranges:
        if found in scattered:
            begin = cover[found.start - first :]
            values.append(np.lib.stride_tricks.as_strided(begin, found.shape, strides))
        else:
            values.append(_read_range(entry, found.start, found.stop).reshape(found.shape))
    return values


class _Range(NamedTuple):
    """The range of a part: its first element, the one after its last, and its own shape."""

    start: int
    stop: int
    shape: tuple[int, ...]


def _range_of(part: Part, shape: tuple[int, ...]) -> _Range:
    bounds = [one.indices(size)[:2] for one, size in zip(part, shape, strict=False)]
    bounds += [(0, size) for size in shape[len(part) :]]
    own = tuple(stop - start for start, stop in bounds)
    if 0 in own:
        return _Range(0, 0, own)
    steps = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    first = sum(step * start for step, (start, _) in zip(steps, bounds, strict=True))
    last = sum(step * (stop - 1) for step, (_, stop) in zip(steps, bounds, strict=True))
    return _Range(first, last + 1, own)


def _read_range(entry: TensorEntry, start: int, stop: int) -> np.ndarray:
    """Reads the elements from `start` to before `stop`, counted through the whole tensor."""
    value = np.empty(stop - start, (READABLE_DTYPES | PACKED_DTYPES)[entry.dtype])
    left = memoryview(value.view(np.uint8))
    with entry.file.open("rb", buffering=0) as raw:
        raw.seek(entry.offset + start * value.itemsize)
        while left:
            if not (count := raw.readinto(left)):
                raise CheckpointError(f"{entry.file} was cut off while it was read; fetch it again")
            left = left[count:]
    return value


def read_ahead(
    entries: Mapping[str, Readable], parts: Mapping[str, Sequence[Part]]
) -> Iterator[tuple[str, Any]]:
    """Yields name and what is read of every tensor in the order of the files.

    Background threads read the next ones meanwhile.

    Args:
        entries: The tensors.
        parts: Parts of each; a tensor that is not named is read whole, as one part.

    Raises:
        CheckpointError: As `read_tensor`.
    """
    ahead: deque[tuple[str, Future[Any]]] = deque()
    with ThreadPoolExecutor(_READERS, thread_name_prefix="lorax-read") as pool:
        try:
            for name in sorted(entries, key=lambda n: (entries[n].file, entries[n].offset)):
                wanted = parts.get(name, [()])
                ahead.append((name, pool.submit(entries[name].read, wanted)))
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
    """Returns the offset of each tensor's data in a complete safetensors file."""
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
    """Writes a safetensors file that every reader of the folder can read.

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
    # safetensors creates files for the owner alone; a server often runs as another user.
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
