"""`lorax train` stopped, resumed, resumed wrongly; and what must never be written anywhere."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorax.cli.main import main
from lorax.recovery.files import read_checkpoint
from lorax.recovery.snapshots import WeightStore
from lorax.runs.folder import find_run
from lorax.system.files import CheckpointError
from tests.tiny import TINY, write_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CANARY = "canaryvogel"
TOKEN = "hf_" + "c4n4ry" * 6
SETTINGS = {
    "model.dtype": "float32",
    "lora.r": 4,
    "lora.lora_dropout": 0.1,
    "lora.target_modules": "[q_proj, down_proj]",
    "data.max_seq_length": 256,
    "train.max_steps": 30,
    "train.per_device_train_batch_size": 2,
    "train.gradient_accumulation_steps": 2,
    "train.gradient_checkpointing": "none",
    "eval.strategy": "steps",
    "eval.steps": 7,
    "save.save_steps": 4,
    "save.load_best_model_at_end": "true",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The demo's data, a word of it replaced by one that stands nowhere else."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("train", "heldout"):
        text = (ROOT / "examples" / "tiny" / "data" / f"{name}.jsonl").read_text()
        lines = text.splitlines()[:60]
        lines[0] = re.sub(r'("content": ")', rf"\g<1>{CANARY} ", lines[0], count=1)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    write_model(folder / "model")
    return folder


def words_of(data, run, *more, **changes):
    """Returns the words of a command that trains on `data`."""
    sources = {"data.train": data / "train.jsonl", "data.eval": data / "heldout.jsonl"}
    sources |= {"model.name_or_path": data / "model", "save.output_dir": run}
    lines = [f"{key}={value}" for key, value in (SETTINGS | sources | changes).items()]
    overrides = ["data.packing=true", "eval.exact_match=false", "save.export=[peft]"]
    return ["train", str(ROOT / "configs" / "tiny_cpu.yaml"), *lines, *more, *overrides]


def start(*arguments, output=subprocess.PIPE, **changes):
    """Starts the command in a process; see `words_of`."""
    return subprocess.Popen(
        [sys.executable, "-m", "lorax.cli", *words_of(*arguments, **changes)],
        cwd=ROOT,
        env=os.environ | {"HF_TOKEN": TOKEN, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        stdout=output,
        stderr=output,
        text=True,
    )


@pytest.fixture
def run_here(monkeypatch, capfd):
    """Runs the command in this process, where it does not come to train."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def run_here(*arguments, **changes):
        code = main(words_of(*arguments, **changes))
        return code, *capfd.readouterr()

    return run_here


def wait_until(process, condition):
    """Waits as long as it takes; pytest's own limit is for a run that hangs."""
    while not condition():
        assert process.poll() is None
        time.sleep(0.02)


def holds(path, text):
    return path.exists() and text in path.read_text()


def cpu_seconds(pid):
    """Returns the processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cpu_seconds_of_children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def finish(process):
    out, err = process.communicate()
    return process.returncode, out, err


def arrays(run):
    newest = max((run / "checkpoints").glob("step-*"))
    found = read_checkpoint(newest)
    values = {path: value.tobytes() for path, value in found.arrays.items()}
    return found.step, values, found.record["progress"]["recent_losses"]


def losses(run):
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if "loss" in record}


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("straight") / "run"
    code, out, err = finish(start(data, run))
    assert code == 0, err
    return run, out + err


@pytest.mark.timeout(1800)
def test_a_run_that_is_stopped_and_resumed_equals_one_that_is_not(
    data, straight, tmp_path, run_here
):
    run = tmp_path / "run"
    process = start(data, run, **{"log.logging_steps": 1})
    wait_until(process, lambda: holds(run / "metrics.jsonl", '"step": 5,'))
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 75, err
    stopped = int(re.search(r"stopped by SIGTERM after step (\d+), saved", err)[1])
    assert 5 <= stopped < 30
    assert arrays(run)[0] == stopped

    code, _, err = run_here(data, run)
    assert code == 2
    assert "holds a run: go on with --resume" in err
    code, _, err = run_here(data, run, "--resume", **{"lora.lora_alpha": 64})
    assert code == 2
    assert "lora.lora_alpha was " in err
    assert arrays(run)[0] == stopped

    code, out, err = finish(start(data, run, "--resume=auto"))
    assert code == 0, err
    assert f"resumed after step {stopped}" in out
    assert arrays(run) == arrays(straight[0]) and len(arrays(run)[2]) == arrays(run)[0]
    assert losses(run) == losses(straight[0])
    names = ["adapter/adapter_model.safetensors", "adapter/adapter_config.json"]
    for name in names:
        assert (run / name).read_bytes() == (straight[0] / name).read_bytes()

    code, out, _ = run_here(data, run, "--resume")
    assert (code, "this run has ended" in out) == (0, True)


def test_a_long_first_step_holds_up_neither_a_signal_nor_the_end_of_the_process(data, tmp_path):
    lines = (data / "train.jsonl").read_text()
    (tmp_path / "many.jsonl").write_text(lines * 200)
    changes = {"data.train": tmp_path / "many.jsonl", "eval.strategy": "no"}
    changes |= {"train.gradient_accumulation_steps": 1000, "save.load_best_model_at_end": "false"}
    changes["model.name_or_path"] = TINY / "model"  # whose step takes long enough
    run = tmp_path / "run"
    others = cpu_seconds_of_children()
    process = start(data, run, **changes)
    wait_until(process, lambda: holds(run / "metrics.jsonl", "eval_loss"))
    begun = cpu_seconds(process.pid)
    wait_until(process, lambda: cpu_seconds(process.pid) > begun + 2)
    # Now its step runs, of some 12,000 rows: it takes several times what the start has taken.
    before = cpu_seconds(process.pid)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 75, err
    assert "stopped by SIGTERM before the first step was done" in err
    used = cpu_seconds_of_children() - others
    assert used < 2 * before, (used, before)


def test_what_is_to_be_resumed_must_be_there(data, tmp_path, run_here):
    code, _, err = run_here(data, tmp_path / "none", "--resume")
    assert code == 2
    assert "holds no run of lorax to resume" in err


def test_a_folder_of_others_is_not_taken_for_a_run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert find_run(tmp_path, "auto")  # what a run leaves that was killed at once
    (tmp_path / "config.yaml").write_text("mine")
    for resume in ("never", "auto", "always"):
        with pytest.raises(CheckpointError):
            find_run(tmp_path, resume)
    assert (tmp_path / "config.yaml").read_text() == "mine"


def test_weights_that_a_run_did_not_write_stay(tmp_path):
    def write(folder):
        folder.mkdir()
        (folder / "adapter.safetensors").write_text("ours")

    for step, name in ((1, "mine.txt"), (2, "adapter.safetensors")):
        (tmp_path / f"step-00000{step}").mkdir()
        (tmp_path / f"step-00000{step}" / name).write_text("before")
    store = WeightStore(tmp_path, write)
    store.save(1)
    (aside,) = tmp_path.glob(".step-000001.superseded-*")
    assert (aside / "mine.txt").read_text() == "before"
    store.save(2)  # of the run that this one goes on with
    assert not list(tmp_path.glob(".step-000002*"))
    assert (tmp_path / "step-000002" / "adapter.safetensors").read_text() == "ours"


def test_a_reader_that_is_gone_ends_no_run_and_changes_no_status(data, tmp_path):
    run, reader = tmp_path / "run", os.pipe()
    process = start(data, run, output=reader[1], **{"log.logging_steps": 1})
    os.close(reader[1])
    wait_until(process, lambda: holds(run / "metrics.jsonl", '"step": 3,'))
    os.close(reader[0])
    wait_until(process, lambda: holds(run / "metrics.jsonl", '"step": 8,'))
    process.send_signal(signal.SIGINT)
    assert process.wait() == 75
    assert arrays(run)[0] >= 8


def test_changed_data_is_noticed(data, straight, tmp_path):
    run, other = tmp_path / "run", tmp_path / "data"
    shutil.copytree(straight[0], run)
    (run / "summary.json").unlink()
    shutil.copytree(data, other)
    lines = (other / "train.jsonl").read_text().splitlines()
    (other / "train.jsonl").write_text("\n".join(lines[::-1]) + "\n")
    code, _, err = finish(start(other, run, "--resume", **{"model.name_or_path": data / "model"}))
    assert code == 2
    assert "the training data changed" in err


def test_tokens_and_training_text_are_written_nowhere(straight):
    run, _ = straight
    for path in run.rglob("*"):
        if path.is_file():
            held = path.read_bytes()
            assert CANARY.encode() not in held, path
            assert TOKEN.encode() not in held, path


def test_an_error_of_the_data_shows_its_place_and_not_its_text(data, tmp_path, run_here):
    broken = Path(shutil.copytree(data, tmp_path / "broken"))
    for name in ("train", "heldout"):
        text = (data / f"{name}.jsonl").read_text()
        (broken / f"{name}.jsonl").write_text(text + f'{{"messages": "{CANARY}{TOKEN}\n')
    code, out, err = run_here(broken, tmp_path / "run")
    assert code == 2
    assert "train.jsonl:61" in err
    assert CANARY not in out + err
    assert TOKEN not in out + err
