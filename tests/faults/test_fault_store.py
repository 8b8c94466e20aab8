"""The checkpoint store and the ways a run ends, one property at a time."""

import errno
import os
import shutil
import threading
from collections import namedtuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lorax.recovery.files import read_checkpoint
from lorax.recovery.store import CheckpointStore
from lorax.system.files import CheckpointError
from tests.faults.stored import arrays


def test_every_dtype_comes_back_bit_for_bit(store):
    record = {"loss": 0.1 + 0.2, "list": [1, None]}
    store.save(7, arrays(7), record, wait=True)
    found = store.restore()
    assert (found.step, found.record) == (7, record)
    for path, value in arrays(7).items():
        assert found.arrays[path].dtype == value.dtype
        assert found.arrays[path].tobytes() == np.asarray(value).tobytes()


def test_a_checkpoint_of_another_version_is_left_as_it_is(store, monkeypatch):
    monkeypatch.setattr("lorax.recovery.files._FORMAT", 1)
    store.save(1, arrays(), {}, wait=True)
    monkeypatch.undo()
    for ask in (store.restore, store.newest_manifest):
        with pytest.raises(CheckpointError, match=r"step-000000001 was written by another version"):
            ask()
    assert store.steps() == [1] and not list(store.directory.glob("damaged-*"))


def test_saving_and_restoring_say_nothing(store, caplog, capfd):
    store.save(1, {"a": np.ones(3, np.float32)}, {}, wait=True)
    assert store.restore().step == 1
    assert not caplog.records and capfd.readouterr() == ("", "")


def test_arrays_that_are_alike_come_back_as_themselves(store):
    arrays = {
        **{f"layer.{i}": np.full((3, 2), i, np.float32) for i in range(5)},
        "other dtype": np.ones((3, 2), ml_dtypes.bfloat16),
        "other shape": np.ones((2, 3), np.float32),
        "number": np.asarray(7, np.int32),
        "another": np.asarray(8, np.int32),
    }
    store.save(1, arrays, {}, wait=True)
    found = store.restore().arrays
    assert list(found) == sorted(arrays)
    for path, value in arrays.items():
        assert found[path].dtype == value.dtype and found[path].shape == value.shape
        np.testing.assert_array_equal(found[path], value)
    written = store.directory / "step-000000001" / "arrays"
    assert len([p for p in written.iterdir() if p.is_dir() and p.name.isdigit()]) == 4


def test_only_as_many_as_asked_for_are_kept_and_the_newest_is_restored(store):
    for step in (1, 2, 3, 10):
        store.save(step, arrays(step), {})
    store.wait()
    assert store.steps() == [3, 10]
    assert store.restore().step == 10


def test_older_ones_stay_while_the_newest_cannot_be_verified(store, monkeypatch):
    for step in (1, 2):
        store.save(step, arrays(step), {}, wait=True)

    def unreadable(folder):
        raise CheckpointError(f"{folder} is rotten")

    monkeypatch.setattr("lorax.recovery.store.read_checkpoint", unreadable)
    with pytest.raises(CheckpointError, match="rotten"):
        store.save(3, arrays(3), {}, wait=True)
    assert store.steps() == [1, 2, 3]


@pytest.mark.parametrize(
    "error, words",
    [
        (ZeroDivisionError("division by zero"), "division by zero"),
        (OSError(errno.EIO, "Input/output error", "/a/file"), "/a/file: Input/output error"),
    ],
)
def test_an_error_of_the_thread_is_raised_by_the_next_call(store, monkeypatch, error, words):
    released = threading.Event()

    def fail(*_):
        released.wait(30)
        raise error

    monkeypatch.setattr("lorax.recovery.store.write_checkpoint", fail)
    store.save(1, arrays(), {})
    released.set()
    store._saving.exception()
    with pytest.raises(CheckpointError, match=f"saving failed: {words}"):
        store.check()
    store.check()  # said once


def test_a_disk_without_room_is_noticed_before_anything_is_written(store, monkeypatch):
    store.save(1, arrays(), {}, wait=True)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(100, 99, 1))
    with pytest.raises(CheckpointError, match=r"step 2 needs 0\.0 MiB, and 32 to spare, but 0"):
        store.save(2, arrays(2), {}, wait=True)
    assert sorted(p.name for p in store.directory.iterdir()) == ["LORAX", "lock", "step-000000001"]


def test_a_damaged_one_is_kept_aside_and_said_aloud(store):
    for step in (1, 2):
        store.save(step, arrays(step), {}, wait=True)
    manifest = store.directory / "step-000000002" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"step": 2', '"step": 3'))
    assert store.restore().step == 1
    (aside,) = store.directory.glob("damaged-000000002-*")
    assert (aside / "manifest.json").read_text() != text
    assert "step 2 is damaged and set aside" in store.said[0]


def test_where_none_is_whole_nothing_is_restored_and_none_is_lost(store):
    store.save(1, arrays(), {}, wait=True)
    (store.directory / "step-000000001" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"none of its checkpoints is whole.*damaged-0*1-"):
        store.restore()
    assert len(list(store.directory.glob("damaged-*"))) == 1


def test_a_swapped_array_is_noticed(store):
    store.save(1, {"a": jnp.zeros(3), "b": jnp.ones(3)}, {}, wait=True)
    store.save(2, {"a": jnp.ones(3), "b": jnp.zeros(3)}, {}, wait=True)
    one, two = (store.directory / f"step-{s:09d}" for s in (1, 2))
    shutil.rmtree(two / "arrays")
    shutil.copytree(one / "arrays", two / "arrays")
    with pytest.raises(CheckpointError, match="a is not what was written"):
        read_checkpoint(two)


def test_a_folder_that_is_not_ours_is_refused_untouched(tmp_path):
    folder = tmp_path / "checkpoints"
    (folder / "step-000000001").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no LORAX, so it is not lorax's"):
        CheckpointStore(folder).open()
    assert [p.name for p in folder.iterdir()] == ["step-000000001"]


def test_a_second_process_is_refused_by_name(store):
    store.open()
    with pytest.raises(CheckpointError, match=f"is in use by process {os.getpid()}"):
        CheckpointStore(store.directory).open()
    store.close()
    second = CheckpointStore(store.directory)
    second.open()
    second.close()


def test_saving_goes_on_while_the_caller_works(store, monkeypatch):
    free = threading.Event()
    write = CheckpointStore._write
    monkeypatch.setattr(CheckpointStore, "_write", lambda *a: (free.wait(5), write(*a)))
    value = jnp.ones(4)
    store.save(1, {"a": value}, {})
    value.delete()  # as a step that consumes its state does
    assert store.steps() == []
    free.set()
    store.wait()
    assert store.restore().arrays["a"].tolist() == [1, 1, 1, 1]
