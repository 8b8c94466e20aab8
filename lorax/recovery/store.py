"""Checkpoints on the disk, verified: a run resumes from them as if it had never stopped.

Orbax writes the arrays. lorax adds a digest of every array, verified on every restore, a commit by
one rename after everything is on the disk, and a folder of its own.
"""

import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lorax.recovery.files import (
    MANIFEST_FILE,
    Checkpoint,
    OtherFormatError,
    Stacks,
    read_checkpoint,
    read_manifest,
    refuse_nonfinite,
    write_checkpoint,
)
from lorax.system.files import CheckpointError, sync, write_folder
from lorax.system.special_files import refuse_special_files
from lorax.system.threads import in_background
from lorax.system.wording import describe

CHECKPOINT_FOLDER = "checkpoints"
"""The folder of checkpoints in a run's folder."""

MARKER_FILE = "LORAX"
LOCK_FILE = "lock"
_STEP = re.compile(r"step-(\d{9})")
_PARTIAL = re.compile(r"\.partial-(step-)?\d{9}-[0-9a-f]{8}")
_MARKER = "Checkpoints of a lorax run. Folders step-*, damaged-* and .partial-* belong to lorax.\n"
_ROOM = 32 * 2**20
"""Bytes that must stay free after a checkpoint is written."""


class SaveError(CheckpointError):
    """A checkpoint that could not be written."""


class CheckpointStore:
    """Writes and restores the checkpoints of one run in a folder of their own.

    ``<directory>/step-000000120`` appears whole or not at all: it is written under another name,
    flushed to the disk and renamed. Each holds a manifest with the SHA-256 of every array and of
    itself. A background thread saves; the next call raises its error. Older checkpoints are removed
    only after the newest one was read back and verified. Only folders of this store's own names are
    ever touched.

    Args:
        directory: Created by the first write. If it exists, it must be one of lorax's.
        keep: Checkpoints to keep.
        versions: Versions of the libraries, for the manifest.
        tell: Called with each line for the user.

    Attributes:
        prunes: Whether old checkpoints are removed; set to False where there is no time to verify
            that the newest one is whole.
        saved: The last step that was saved, and when, by `time.time`.

    Raises:
        CheckpointError: If `directory` is something else, or another process uses it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = 2,
        versions: Mapping[str, str] | None = None,
        tell: Callable[[str], object] = print,
    ):
        self.directory = directory
        self.keep = keep
        self.versions = dict(versions or {})
        self.prunes = True
        self.saved: tuple[int, float] | None = None
        self._tell = tell
        self._saving: Future[None] | None = None
        self._error: BaseException | None = None
        self._lock: Any = None
        self.blocked_seconds = 0.0

    def open(self) -> None:
        """Creates the folder and holds its lock until `close`."""
        if self._lock is not None:
            return
        marker = self.directory / MARKER_FILE
        # Listed once: another process may be creating it now, and the marker is its first file.
        names = set(os.listdir(self.directory)) if self.directory.exists() else set()
        if names and not (MARKER_FILE in names and marker.is_file()):
            raise CheckpointError(
                f"{self.directory} holds files and no {MARKER_FILE}, so it is not lorax's; choose "
                "another save.output_dir"
            )
        refuse_special_files(self.directory)
        above = list(self.directory.absolute().parents)
        existing = next(index for index, folder in enumerate(above) if folder.exists())
        self.directory.mkdir(parents=True, exist_ok=True)
        marker.write_text(_MARKER, encoding="utf-8")
        # Every folder that may hold a new name: the run's own may be new, whoever created it.
        for folder in (self.directory, *above[: max(existing + 1, 2)]):
            sync(folder)
        lock = (self.directory / LOCK_FILE).open("a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            lock.close()
            raise CheckpointError(
                f"{self.directory.parent} is in use by {owner}; wait for it, or choose another "
                "save.output_dir"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()}\n")
        lock.flush()
        self._lock = lock
        for left in self.directory.iterdir():
            if _PARTIAL.fullmatch(left.name):
                shutil.rmtree(left, ignore_errors=True)

    def steps(self) -> list[int]:
        """Returns the steps of all folders named like a checkpoint, in ascending order."""
        if not self.directory.is_dir():
            return []
        names = (p.name for p in self.directory.iterdir() if p.is_dir() and not p.is_symlink())
        return sorted(int(m[1]) for name in names if (m := _STEP.fullmatch(name)))

    def save(
        self, step: int, arrays: Mapping[str, Any], record: Mapping[str, Any], *, wait: bool = False
    ) -> None:
        """Copies the arrays from the devices and writes them in a background thread.

        A step that exists is not written again; if it is not whole, it is set aside.

        Args:
            step: Optimizer steps done.
            arrays: Device or host arrays, by path.
            record: All else to save, as JSON values.
            wait: Whether to return only when the checkpoint is on the disk.

        Raises:
            SaveError: If this save, with `wait`, or one before failed.
        """
        self.open()
        self._join()
        before = self._error
        self._error = None
        if not self._has(step):  # a step of a run is the same whenever it is saved
            self._begin(step, arrays, record)
        if wait:
            self._join()
        # An error of the save before must not prevent this one.
        self._error = self._error or before
        self.check()

    def _has(self, step: int) -> bool:
        """Says whether a checkpoint of a step exists; sets one with a damaged manifest aside."""
        if step not in self.steps():
            return False
        try:
            read_manifest(self._folder(step))
            return True
        except OtherFormatError:
            raise
        except CheckpointError as error:
            self._set_aside(step, error)
            return False

    def _begin(self, step: int, arrays: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        started = time.monotonic()
        found = jax.device_get(dict(arrays))
        host = {path: _own(arrays[path], value) for path, value in found.items()}
        self.blocked_seconds = time.monotonic() - started
        record = json.loads(json.dumps(record, allow_nan=False))

        def work() -> None:
            stacks = Stacks.copy(host)
            host.clear()  # they may be large
            self._write(step, stacks, record)

        self._saving = in_background("checkpoint", work)

    def check(self) -> None:
        """Raises the error of a background save that has ended."""
        if self._saving is not None and self._saving.done():
            self._join()
        if self._error is not None:
            error = self._error
            self._error = None
            if isinstance(error, CheckpointError):
                raise SaveError(str(error)) from error
            found = self.steps()
            safe = f"; step {found[-1]} is the newest checkpoint" if found else ""
            raise SaveError(f"{self.directory}: saving failed: {describe(error)}{safe}") from error

    def wait(self) -> None:
        """Waits for the background save, and raises its error."""
        self._join()
        self.check()

    def _join(self) -> None:
        if self._saving is not None:
            self._error = self._saving.exception() or self._error
            self._saving = None

    def close(self) -> None:
        """Waits for the background save and releases the lock; may be called again."""
        try:
            self.wait()
        finally:
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def newest_manifest(self) -> Mapping[str, Any] | None:
        """Returns the manifest of the newest checkpoint whose manifest is whole, or None."""
        for step in reversed(self.steps()):
            try:
                return read_manifest(self._folder(step))
            except OtherFormatError:
                raise
            except CheckpointError:
                continue  # `restore` will report it
        return None

    def restore(self, manifest: Mapping[str, Any] | None = None) -> Checkpoint | None:
        """Returns the newest checkpoint that is whole, or None if there never was one.

        One that is not whole is renamed to ``damaged-…`` with a warning, and the one before is
        tried.

        Args:
            manifest: From `newest_manifest`, to read it once.

        Raises:
            CheckpointError: If there are, or were, checkpoints and none is whole.
            OSError: If the system cannot read one now that may be whole.
        """
        self.open()
        for step in reversed(self.steps()):
            known = manifest is not None and manifest["step"] == step
            try:
                return read_checkpoint(self._folder(step), manifest if known else None)
            except OtherFormatError:
                raise
            except CheckpointError as error:
                self._set_aside(step, error)
        damaged = sorted(path.name for path in self.directory.glob("damaged-*"))
        if damaged:
            raise CheckpointError(
                f"{self.directory}: none of its checkpoints is whole; they are kept as "
                f"{', '.join(damaged)}. Start a new run in another save.output_dir"
            )
        return None

    def _set_aside(self, step: int, error: CheckpointError) -> None:
        self._folder(step).rename(self.directory / f"damaged-{step:09d}-{time.time_ns()}")
        sync(self.directory)
        self._tell(f"checkpoint of step {step} is damaged and set aside: {error}")

    def _folder(self, step: int) -> Path:
        return self.directory / f"step-{step:09d}"

    def _write(self, step: int, arrays: Stacks, record: Any) -> None:
        refuse_nonfinite(arrays, f"step {step}")
        size = sum(stack.nbytes for stack in arrays.stacks.values())
        self.directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.directory).free
        if free < size + _ROOM:
            raise CheckpointError(
                f"{self.directory}: the checkpoint of step {step} needs {size / 2**20:,.1f} MiB, "
                f"and {_ROOM / 2**20:.0f} to spare, but {free / 2**20:,.1f} MiB are free; the "
                "checkpoints before it are untouched. Make room, or set save.output_dir to another "
                "disk"
            )
        partial = f".partial-{step:09d}-{secrets.token_hex(4)}"
        with write_folder(self._folder(step), partial=partial) as fresh:
            write_checkpoint(fresh, step, arrays, record, self.versions)
        if self.prunes:
            self.prune(step)
        self.saved = step, time.time()

    def prune(self, newest: int, *, verified: bool = False) -> None:
        """Removes checkpoints beyond `keep`, once the newest one has been read back.

        A folder that lorax did not write stays, whatever its name.

        Args:
            newest: Step that is kept; later ones are left alone.
            verified: Whether it was read back already.
        """
        folders = [self._folder(step) for step in self.steps() if step <= newest]
        old = [folder for folder in folders if (folder / MANIFEST_FILE).is_file()][: -self.keep]
        if not old:
            return
        if not verified:
            read_checkpoint(self._folder(newest))
        for folder in old:
            self._remove(folder)

    def _remove(self, folder: Path) -> None:
        # Renamed first, so that no partial checkpoint ever has its name.
        doomed = self.directory / f".partial-{folder.name}-{secrets.token_hex(4)}"
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _own(given: Any, found: Any) -> np.ndarray:
    """Returns `found`, the host's value of `given`, as an array of its own."""
    is_copy = isinstance(given, jax.Array) and all(d.platform != "cpu" for d in given.devices())
    return found if is_copy else np.array(found)
