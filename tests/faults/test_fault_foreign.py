"""Checkpoints that cannot be read, or are others', are told from those that are damaged."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lorax.recovery.store import CheckpointStore
from lorax.system.files import CheckpointError
from lorax.system.watchdog import STUCK_STATUS
from tests.faults.stored import STUCK, arrays

PASSING = [
    OSError(errno.EMFILE, "Too many open files"),
    PermissionError(errno.EACCES, "Permission denied"),
    ValueError("PERMISSION_DENIED: Error opening file [OS error 13: EACCES]"),
    ValueError("UNKNOWN: reading failed [OS error 5: EIO Input/output error]"),
]


ABOUT_THE_FILE = [
    FileNotFoundError(errno.ENOENT, "No such file"),
    ValueError("NOT_FOUND: Error opening file [OS error 2: ENOENT]"),
    ValueError("the checksum does not match"),
]


@pytest.mark.parametrize("error", PASSING + ABOUT_THE_FILE, ids=str)
def test_only_what_is_about_the_file_makes_a_checkpoint_a_damaged_one(store, monkeypatch, error):
    for step in (1, 2):
        store.save(step, arrays(step), {}, wait=True)
    import tensorstore

    def refuse(*_, **__):
        raise RuntimeError("the library's own words") from error

    monkeypatch.setattr(tensorstore, "open", refuse)
    if error in PASSING:
        with pytest.raises(RuntimeError, match="the library's own words"):
            store.restore()
        assert store.steps() == [1, 2] and not store.said
    else:
        with pytest.raises(CheckpointError, match="none of its checkpoints is whole"):
            store.restore()


def test_a_file_that_may_not_be_read_raises_the_systems_own_error(store, monkeypatch):
    store.save(1, arrays(1), {}, wait=True)
    read = Path.open

    def refuse(path, *arguments, **options):
        if "arrays" in path.parts:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied.*arrays"):
        store.restore()
    assert store.steps() == [1] and not store.said


DAMAGED = """
import sys
from pathlib import Path
from lorax.recovery.store import CheckpointStore
CheckpointStore(Path(sys.argv[1]), tell=lambda _: None).restore()
"""


def test_one_damaged_array_is_all_that_is_told(store):
    # The others are large, so that they are still being read when the small one has failed.
    draw = np.random.default_rng(0)
    large = {f"b{i}": draw.standard_normal((200, 1000 + i), np.float32) for i in range(24)}
    store.save(1, {"a": np.arange(3.0)} | large, {}, wait=True)
    store.close()
    (chunk,) = (store.directory / "step-000000001" / "arrays" / "00000").glob("0*")
    chunk.write_bytes(b"xx")
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'kernels'}"}
    command = [sys.executable, "-c", DAMAGED, str(store.directory)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "none of its checkpoints is whole" in done.stderr
    assert "Event loop" not in done.stderr and "call_soon" not in done.stderr


@pytest.mark.parametrize("place", ["lock", "step-000000001/arrays/00000/.zarray", "pipe"])
def test_a_fifo_among_the_checkpoints_is_refused_and_not_opened(store, place):
    store.save(1, arrays(), {}, wait=True)
    store.close()
    path = store.directory / place
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    for use in (store.restore, lambda: store.save(2, arrays(2), {}, wait=True)):
        with pytest.raises(CheckpointError, match=f"{place} is a FIFO, where a run has only files"):
            use()
    assert store.steps() == [1]


def test_folders_of_others_stay_whatever_their_names(store):
    store.save(2, arrays(2), {}, wait=True)
    mine = [store.directory / name for name in ("step-000000001", ".partial-mine")]
    for folder in mine:
        folder.mkdir()
        (folder / "notes").write_text("mine")
    copy = store.directory / "step-000000099"
    shutil.copytree(store.directory / "step-000000002", copy)
    for step in (3, 4, 5):
        store.save(step, arrays(step), {}, wait=True)
    store.close()
    store.open()
    assert all((folder / "notes").read_text() == "mine" for folder in mine)
    assert store.steps() == [1, 4, 5, 99]


def test_what_only_has_the_name_of_a_step_gives_way_to_it(store):
    store.open()
    (store.directory / "step-000000003").mkdir()
    store.save(3, arrays(3), {}, wait=True)
    assert store.restore().step == 3
    assert store.said[0].startswith("checkpoint of step 3 is damaged and set aside")


def test_every_folder_above_that_is_new_is_flushed(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr("lorax.recovery.store.sync", flushed.append)
    with contextlib.closing(CheckpointStore(tmp_path / "a" / "b" / "c" / "checkpoints")) as store:
        store.open()
    wanted = [store.directory, *store.directory.parents]
    assert flushed == wanted[: wanted.index(tmp_path) + 1]


def test_a_stuck_run_ends_though_its_standard_error_is_no_file():
    script = "import io, sys; sys.stderr = io.StringIO()" + STUCK
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True)  # it ends before its hour
    assert done.returncode == STUCK_STATUS and "waits_for_ever" in done.stderr
