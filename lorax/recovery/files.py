"""A checkpoint on the disk: arrays as Orbax writes them, and a manifest with their digests."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from lorax.system.files import MAX_INDEX_BYTES, CheckpointError, read_json

MANIFEST_FILE = "manifest.json"
_FORMAT = 2
_PLACE = ("stack", "row")
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
"""Errors of the system that mean that a checkpoint is incomplete."""

_PASSING = re.compile(r"OS error (\d+)|PERMISSION_DENIED|UNAVAILABLE|RESOURCE_EXHAUSTED")
"""Messages of TensorStore, which raises no OSError, for errors that may pass."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A restored checkpoint.

    Attributes:
        step: Optimizer steps done.
        arrays: Host arrays, by path.
        record: All else that was saved, as JSON values.
        versions: Versions of the libraries that saved it.
    """

    step: int
    arrays: Mapping[str, np.ndarray]
    record: Mapping[str, Any]
    versions: Mapping[str, str]


class OtherFormatError(CheckpointError):
    """A checkpoint that another version of lorax wrote."""


@dataclasses.dataclass(frozen=True)
class Stacks:
    """Copies of arrays; those of one shape and dtype in one stack.

    The layers of a model are alike, so a few files replace a thousand.

    Attributes:
        stacks: The stacks by the name of their file.
        places: The stack and the row of each array, by its path.
    """

    stacks: Mapping[str, np.ndarray]
    places: Mapping[str, tuple[str, int]]

    @classmethod
    def copy(cls, arrays: Mapping[str, Any]) -> Self:
        """Copies host arrays."""
        alike: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        for path, value in arrays.items():
            value = np.asarray(value)
            alike.setdefault((value.dtype.name, value.shape), []).append(path)
        named = {f"{index:05d}": paths for index, paths in enumerate(alike.values())}
        stacks = {name: np.stack([arrays[path] for path in paths]) for name, paths in named.items()}
        return cls(
            stacks, {p: (name, i) for name, paths in named.items() for i, p in enumerate(paths)}
        )

    def items(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields path and array, as views."""
        for path, (name, row) in self.places.items():
            yield path, self.stacks[name][row, ...]


def write_checkpoint(
    folder: Path,
    step: int,
    stacks: Stacks,
    record: Mapping[str, Any],
    versions: Mapping[str, str],
) -> None:
    """Writes a checkpoint into an empty folder, which `write_folder` has flushed."""
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(_is_news)
    # Not in TensorStore's database of chunks: its description leaks memory with every save.
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    with contextlib.closing(ocp.Checkpointer(handler)) as checkpointer:
        checkpointer.save(
            (folder / "arrays").absolute(), args=ocp.args.PyTreeSave(dict(stacks.stacks))
        )
    manifest = {
        "format": _FORMAT,
        "step": step,
        "arrays": {
            path: _describe(value) | dict(zip(_PLACE, stacks.places[path], strict=True))
            for path, value in stacks.items()
        },
        "record": dict(record),
        "versions": dict(versions),
    }
    manifest["digest"] = _digest(manifest)
    text = json.dumps(manifest, indent=1, sort_keys=True)
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def read_checkpoint(folder: Path, manifest: Mapping[str, Any] | None = None) -> Checkpoint:
    """Reads a checkpoint and verifies every array of it.

    Args:
        folder: Where it is.
        manifest: From `read_manifest`, if it was read before.

    Raises:
        CheckpointError: If anything in it is missing, changed or not finite.
    """
    manifest = manifest or read_manifest(folder)
    entries = manifest["arrays"]
    names = sorted({entry["stack"] for entry in entries.values()})
    stored = _read_arrays(folder / "arrays", names)
    arrays = {}
    for path, entry in entries.items():
        place = {name: entry[name] for name in _PLACE}
        stack = stored[place["stack"]]
        # A stack of another shape has other rows, or none: the description shows it.
        value = np.asarray(stack[place["row"]] if stack.shape[:1] > (place["row"],) else stack)
        if _describe(value) | place != entry:
            raise CheckpointError(f"{folder}: {path} is not what was written")
        arrays[path] = value
    refuse_nonfinite(arrays, str(folder))
    return Checkpoint(manifest["step"], arrays, manifest["record"], manifest["versions"])


def _is_news(record: logging.LogRecord) -> bool:
    # Orbax warns at every save that a merge that nobody requested was skipped.
    return "Skipping merge of OCDBT" not in str(record.msg)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a checkpoint, and verifies it."""
    manifest = read_json(folder / MANIFEST_FILE, MAX_INDEX_BYTES)
    digest = manifest.pop("digest", None)
    if digest != _digest(manifest):
        raise CheckpointError(f"{folder / MANIFEST_FILE} is not what was written")
    if manifest.get("format") != _FORMAT:
        raise OtherFormatError(
            f"{folder} was written by another version of lorax (format {manifest.get('format')}, "
            f"and this one reads {_FORMAT}): resume it with that version, or start a new run in "
            "another save.output_dir"
        )
    if folder.name != f"step-{manifest['step']:09d}":
        raise CheckpointError(f"{folder} holds step {manifest['step']}: it was renamed")
    return manifest


def _read_arrays(folder: Path, names: list[str]) -> dict[str, np.ndarray]:
    # Orbax would read them in an event loop, and close it when one read fails. The other reads then
    # print errors about the loop, next to the one that matters.
    import tensorstore

    def open_array(name: str) -> Any:
        kvstore = {"driver": "file", "path": str((folder / name).absolute())}
        spec = {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}
        return tensorstore.open(spec, open=True, read=True)

    _open_all(folder)
    try:
        opened = [open_array(name) for name in names]
        reads = [array.result().read() for array in opened]
        return {n: np.asarray(read.result()) for n, read in zip(names, reads, strict=True)}
    except MemoryError:
        raise
    except Exception as error:
        if _is_passing(error):
            raise
        # TensorStore raises several kinds, most of which do not name the file.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{folder} cannot be read: {reason[:300]}") from error


def _is_passing(error: BaseException | None) -> bool:
    """Says whether an error comes from the state of the system, not from the content of a file."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno not in _GONE
        said = _PASSING.search(str(error))
        if said and not (said[1] and int(said[1]) in _GONE):
            return True
        error = error.__cause__ or error.__context__
    return False


def _open_all(folder: Path) -> None:
    """Raises the system's own error if a file cannot be read: Orbax's hides the reason."""

    def fail(error: OSError) -> None:
        if _is_passing(error):
            raise error

    for parent, _, files in os.walk(folder, onerror=fail):
        for name in files:
            (Path(parent) / name).open("rb").close()


def refuse_nonfinite(arrays: Mapping[str, np.ndarray] | Stacks, where: str) -> None:
    """Raises `CheckpointError` naming the first array that holds NaN or infinity."""
    for path, value in arrays.items():
        inexact = jax.numpy.issubdtype(value.dtype, jax.numpy.inexact)
        if inexact and not np.isfinite(np.asarray(value, np.float32)).all():
            raise CheckpointError(f"{where}: {path} holds numbers that are not finite")


def _describe(value: np.ndarray) -> dict[str, Any]:
    data = np.ascontiguousarray(value).view(np.uint8).reshape(-1) if value.ndim else value.tobytes()
    return {
        "dtype": value.dtype.name,
        "shape": list(value.shape),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _digest(manifest: Mapping[str, Any]) -> str:
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
