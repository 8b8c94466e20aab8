"""The checkpoint store and the ways a run ends, one property at a time."""

import contextlib
import errno
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lorax.models.stack.recompute import settings_of
from lorax.recovery.files import read_checkpoint
from lorax.recovery.identity import fingerprint_file, fingerprint_weights, refuse_other_run
from lorax.recovery.progress import Progress
from lorax.recovery.store import CheckpointStore
from lorax.recovery.tree import fill_tree, flatten_tree
from lorax.system.files import CheckpointError
from lorax.system.signals import StopRequest
from lorax.system.watchdog import STUCK_STATUS
from lorax.training.events import is_spike

DTYPES = ["float32", "bfloat16", "float16", "int32", "bool", "uint32"]


def arrays(step=1):
    values = np.arange(6).reshape(2, 3)
    made = {dtype: jnp.asarray(values.astype(jnp.dtype(dtype))) for dtype in DTYPES}
    return made | {"scalar": jnp.float32(-0.0), "step": np.int32(step)}


@pytest.fixture
def store(tmp_path):
    said = []
    found = CheckpointStore(tmp_path / "checkpoints", tell=said.append)
    found.said = said
    yield found
    found._error = None
    found.close()


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


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.pop("x.0"), "lacks x.0"),
        (lambda a: a.update(y=np.zeros(1)), "has y"),
        (lambda a: a.update({"x.0": np.zeros(3, np.float32)}), r"x.0 is float32\[3\], .*\[2\]"),
        (lambda a: a.update({"x.0": np.zeros(2, np.int32)}), "x.0 is int32"),
    ],
)
def test_arrays_of_another_model_are_refused_by_name(change, message):
    like = {"x": [jnp.zeros(2)]}
    held = {path: np.asarray(leaf) for path, leaf in flatten_tree(like).items()}
    jax.tree.map(np.testing.assert_array_equal, fill_tree(like, held, "here"), like)
    change(held)
    with pytest.raises(CheckpointError, match=message):
        fill_tree(like, held, "here")


def test_another_run_is_refused_with_all_that_differs():
    saved = {"settings": {"lora.r": 8, "train.seed": 1}, "devices": 1, "tokenizer": "a"}
    now = {"settings": {"lora.r": 4, "train.seed": 1}, "devices": 2, "tokenizer": "b"}
    with pytest.raises(ValueError) as error:
        refuse_other_run(saved, now, "outputs/run", settings_of)
    for part in ("outputs/run", "lora.r was 8 and is 4", "devices changed: 1 then, 2 now"):
        assert part in str(error.value)
    assert "the tokenizer changed" in str(error.value)
    refuse_other_run(saved, saved, "outputs/run", settings_of)
    # Of an older version, which took for fixed what may differ now.
    older = saved | {"settings": saved["settings"] | {"train.skip_nonfinite_steps": 0}}
    refuse_other_run(older, saved, "outputs/run", settings_of)
    # Or one without a setting: it ran as that setting's default says.
    newer = lambda value: (
        saved | {"settings": {**saved["settings"], "model.offload_embedding": value}}
    )
    refuse_other_run(saved, newer(False), "outputs/run", settings_of)
    with pytest.raises(ValueError, match=r"model\.offload_embedding was not there and is true"):
        refuse_other_run(saved, newer(True), "outputs/run", settings_of)


def test_progress_survives_json():
    import dataclasses
    import json

    progress = Progress(weights=[1, 3], notes={"exact match": None})
    progress.note(3, 0.1)
    assert Progress(**json.loads(json.dumps(dataclasses.asdict(progress)))) == progress


@pytest.mark.parametrize("size", [10, 6 * 2**20, 9 * 2**20])
def test_a_change_at_either_end_of_a_file_changes_its_fingerprint(tmp_path, size):
    path = tmp_path / "weights"
    data = bytearray(size)
    path.write_bytes(data)
    before = fingerprint_file(path)
    for at in (0, size - 1):
        data[at] ^= 1
        path.write_bytes(data)
        assert fingerprint_file(path) != before
        data[at] ^= 1
    path.write_bytes(bytes(data) + b"\0")
    assert fingerprint_file(path) != before


def test_a_spike_is_noticed_and_noise_is_not():
    noise = [float(x) for x in np.random.default_rng(0).normal(2.0, 0.1, 200)]
    assert not any(is_spike(loss, noise[max(at - 50, 0) : at]) for at, loss in enumerate(noise))
    assert is_spike(4.0, noise[-50:]) and not is_spike(4.0, noise[-19:])
    assert not is_spike(float("nan"), noise[-50:])


def test_the_losses_that_a_loss_is_compared_with_are_the_last_fifty_finite_ones():
    progress = Progress()
    for step, loss in enumerate([9.0, *[2.0] * 30, math.nan, *[3.0] * 20], start=1):
        progress.note(step, loss)
    assert (progress.step, progress.train_loss) == (52, 3.0)
    assert progress.recent_losses == [2.0] * 30 + [3.0] * 20


STUCK = """
import time
from lorax.system.watchdog import Watchdog
def waits_for_ever():
    time.sleep(3600)
with Watchdog(0.5).watching():
    waits_for_ever()
"""


def test_a_stuck_run_ends_with_its_stacks_printed():
    command = [sys.executable, "-c", STUCK]
    done = subprocess.run(command, capture_output=True, text=True)  # it ends before its hour
    assert done.returncode == STUCK_STATUS
    assert "waits_for_ever" in done.stderr
    assert "--resume" in done.stderr


TWICE = """
import os, signal, sys, time
from lorax.system.signals import StopRequest
stop = StopRequest()
with stop.listening():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    print("noted", stop.received, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
    print("still here", flush=True)
"""


def test_the_first_signal_is_noted_and_the_second_ends_at_once():
    command = [sys.executable, "-c", TWICE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "noted SIGTERM\n"
    assert done.returncode == -15
    assert "saving and stopping" in done.stderr


def test_a_terminal_that_goes_away_asks_once_however_often_it_says_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        stop = StopRequest()
        with stop.listening():
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received == "SIGHUP"
        os.kill(os.getpid(), signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        stop = StopRequest()
        with stop.listening():
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_stops_left_goes_when_the_run_goes_on(store):
    store.prunes = False
    for step in (1, 2, 3, 4):
        store.save(step, arrays(step), {}, wait=True)
    assert store.steps() == [1, 2, 3, 4]
    store.prune(store.restore().step, verified=True)
    assert store.steps() == [3, 4]


def test_the_package_never_runs_what_it_reads():
    words = ["pickle.", "import pickle", "eval(", "exec(", "os.system", "shell=True"]
    words += ["trust_remote_code=True", "marshal", "torch.load", "allow_pickle=True"]
    root = Path(__file__).parents[2]
    for path in [*root.glob("lorax/**/*.py"), *root.glob("kernels/**/*.py")]:
        text = path.read_text().replace(".eval(", "").replace("model.eval", "")
        assert not [word for word in words if word in text], path


def test_weights_are_known_by_their_names_shapes_and_values():
    weights = {"a": jnp.ones((20, 3)), "b": jnp.zeros(())}
    known = fingerprint_weights(weights)
    assert fingerprint_weights(dict(weights)) == known
    for other in (
        {"a": jnp.ones((20, 3)).at[2, 1].set(2.0), "b": jnp.zeros(())},
        {"a": jnp.ones((21, 3)), "b": jnp.zeros(())},
        {"a": jnp.ones((20, 3), jnp.bfloat16), "b": jnp.zeros(())},
        {"c": jnp.ones((20, 3)), "d": jnp.zeros(())},
        {"a": jnp.ones((20, 3)), "b": jnp.ones(())},
    ):
        assert fingerprint_weights(other) != known


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
