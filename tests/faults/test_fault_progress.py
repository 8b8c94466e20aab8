"""What goes on with a run: its identity, its progress, its end by a signal or a hang."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax.models.stack.recompute import settings_of
from lorax.recovery.identity import fingerprint_file, fingerprint_weights, refuse_other_run
from lorax.recovery.progress import Progress
from lorax.recovery.tree import fill_tree, flatten_tree
from lorax.system.files import CheckpointError
from lorax.system.signals import StopRequest
from lorax.system.watchdog import STUCK_STATUS
from lorax.training.events import is_spike
from tests.faults.stored import STUCK, arrays


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


def test_arrays_of_an_older_layout_are_found_under_their_names_of_today():
    adapter = {"lora_a": jnp.arange(3.0), "lora_b": jnp.arange(2.0)}
    like = {"mu": {"q_proj": {"attached": {"default": adapter}, "bias": jnp.ones(2)}}}
    held = {"mu.q_proj.lora_a": np.ones(3, np.float32), "mu.q_proj.lora_b": np.ones(2, np.float32)}
    held["mu.q_proj.bias"] = np.zeros(2, np.float32)
    found = flatten_tree(fill_tree(like, held, "here"))
    assert {path: float(value.sum()) for path, value in found.items()} == {
        "mu.q_proj.attached.default.lora_a": 3.0,
        "mu.q_proj.attached.default.lora_b": 2.0,
        "mu.q_proj.bias": 0.0,
    }
    del held["mu.q_proj.lora_b"]
    with pytest.raises(CheckpointError, match=r"lacks mu\.q_proj\.attached\.default\.lora_b"):
        fill_tree(like, held, "here")
