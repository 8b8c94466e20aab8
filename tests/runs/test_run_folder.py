"""A run's folder: what is damaged or no file in it is told before anything trains or hangs."""

import json
import logging
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorax.cli.main import main
from lorax.report.log import read_metrics
from lorax.runs.folder import SavedRun, find_run
from lorax.system.files import CheckpointError
from tests.tiny import shallow_model

pytestmark = pytest.mark.slow

TINY = Path(__file__).parents[2] / "examples" / "tiny"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of two steps that ended while it exported, with the checkpoints of both."""
    folder = tmp_path_factory.mktemp("stopped")
    rows = (TINY / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(rows[:8]))
    config = {
        "model": {"name_or_path": str(shallow_model()), "dtype": "float32"},
        "lora": {"r": 2, "target_modules": ["q_proj"]},
        "data": {"train": str(folder / "rows.jsonl"), "max_seq_length": 128},
        "train": {"max_steps": 2, "gradient_checkpointing": "none"},
        "save": {"output_dir": str(folder / "run"), "save_steps": 1, "export": ["peft"]},
    }
    (folder / "run.yaml").write_text(json.dumps(config))

    def stop(*_, **__):
        raise OSError("no room")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorax.runs.exports.export_model", stop)
        assert main(["train", str(folder / "run.yaml")]) == 2
    assert not (folder / "run" / "summary.json").exists()
    return folder


@pytest.fixture
def run(stopped, tmp_path, capsys):
    """A copy of it, and what goes on with it."""
    here = Path(shutil.copytree(stopped / "run", tmp_path / "run"))

    def resume():
        output = f"save.output_dir={here}"
        code = main(["train", str(stopped / "run.yaml"), "--resume", output])
        return code, "".join(capsys.readouterr())

    return here, resume


@pytest.mark.parametrize("damage", [b'{"step": 1, "lo\n', b"\0\0\0\n", b"\xff\xfe\n"])
def test_a_damaged_line_of_the_log_is_told_before_training(run, damage):
    here, resume = run
    path = here / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(damage + whole)
    code, printed = resume()
    assert code == 2 and f"{path}:1: not JSON: " in printed and "remove that line" in printed
    assert "Settings" not in printed and path.read_bytes() == damage + whole


def test_the_log_of_a_resumed_run_holds_each_step_once(run, monkeypatch):
    here, resume = run
    before = [record["step"] for record in read_metrics(here / "metrics.jsonl")]
    assert before == [1, 2]
    shutil.rmtree(here / "checkpoints" / "step-000000002")
    kinds = (here / "row_kinds.json").read_text()
    assert json.loads(kinds) == {"kinds": ["chat"]}

    def fail(*_, **__):
        raise RuntimeError("no fonts [/x]")

    monkeypatch.setattr("lorax.report.curve.draw_loss_curve", fail)
    code, printed = resume()
    assert code == 0 and "resumed after step 1" in printed
    lines = (here / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == before
    assert (here / "row_kinds.json").read_text() == kinds
    # A plot that fails ends no run.
    assert "WARNING: no loss curve: no fonts [/x]" in printed
    files = json.loads((here / "summary.json").read_text())["files"]
    assert "loss curve" not in files and "peft" in files and not (here / "loss.png").exists()


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "metrics.jsonl",
        "versions.json",
        "stop_tokens.json",
        "row_kinds.json",
        "chat_template.jinja",
        "checkpoints/lock",
        "checkpoints/step-000000002/arrays/pipe",
        "weights/pipe",
    ],
)
def test_a_fifo_in_a_runs_folder_is_refused_by_every_command(run, tmp_path, name, capsys):
    here, resume = run
    path = here / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    code, printed = resume()
    assert code == 2 and f"{path} is a FIFO, where a run has only files and folders" in printed
    for words in (
        ["generate", str(here), "--prompt", "x"],
        ["export", str(here), "--format", "peft", "--out", str(tmp_path / "out")],
    ):
        assert main(words) == 2
        assert f"{path} is a FIFO, where a run has" in capsys.readouterr().err
    path.unlink()


def test_a_device_and_a_link_to_one_are_no_files_of_a_run(run):
    here, resume = run
    (here / "notes").symlink_to("/dev/zero")
    code, printed = resume()
    assert code == 2 and "notes is a device, where a run has only files and folders" in printed


def test_a_run_without_its_config_is_told_what_is_missing(run, tmp_path, capsys):
    here, _ = run
    (here / "config.yaml").unlink()
    shutil.copytree(here / "weights" / "step-000002", here / "adapter")
    out = ["--format", "peft", "--out", str(tmp_path / "out")]
    assert main(["export", str(here), *out]) == 2
    said = capsys.readouterr().err
    assert "holds adapter, checkpoints, " in said
    assert "give a run's folder, which holds config.yaml, or an adapter's, which holds" in said
    assert f"; its adapter is in {here / 'adapter'}" in said
    assert main(["export", str(here / "adapter"), *out]) == 0  # which works


def test_a_run_that_has_not_ended_names_commands_for_its_last_save(tmp_path):
    (tmp_path / "weights" / "step-000002").mkdir(parents=True)
    model = SimpleNamespace(name_or_path="some/base model")
    config: Any = SimpleNamespace(model=model)
    with pytest.raises(ValueError, match="the run has not ended") as refused:
        _ = SavedRun(tmp_path, config, None, None, None).adapter
    saved = tmp_path / "weights" / "step-000002"
    assert f"`lorax generate 'some/base model' --adapter {saved}`" in str(refused.value)
    assert f"`lorax export {saved} --base 'some/base model' --format merged" in str(refused.value)


@pytest.fixture
def compilations():
    """The names of the functions that XLA compiles while the test runs."""
    found, log = [], logging.getLogger("jax._src.interpreters.pxla")
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    yield lambda: [re.findall(r"Compiling (\S+)", text)[0] for text in found if "Compil" in text]
    log.removeHandler(handler)
    log.setLevel(level)


def test_a_run_with_no_step_left_is_exported_without_a_compiled_step(run, compilations):
    here, resume = run
    code, printed = resume()
    assert code == 0 and "resumed after step 2" in printed and "compiled the step" not in printed
    assert (here / "summary.json").exists() and (here / "adapter").is_dir()
    assert compilations() and not [name for name in compilations() if "step" in name]
    # And one that has ended does nothing but tell what it came to.
    before = len(compilations())
    code, again = resume()
    assert code == 0 and len(compilations()) == before
    assert f"{here}: this run has ended, nothing is left to train; it came to" in again
    assert printed.partition(" Result ")[2].splitlines()[1:] == again.splitlines()[1:]


def test_a_run_that_is_looked_for_from_another_directory_says_where(stopped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = stopped / "run.yaml"
    with pytest.raises(CheckpointError) as refused:
        find_run(Path("run"), "always")
    assert f"run holds no run of lorax to resume (looked for from {tmp_path})" in str(refused.value)
    assert "begun in another directory, go there" in str(refused.value)
    monkeypatch.chdir(stopped)
    assert find_run(Path("run"), "always") and config.is_file()


def test_a_longer_run_is_told_how_to_begin_from_its_weights_which_works(run, capsys, tmp_path):
    here, _ = run
    words = ["train", str(here / "config.yaml"), f"save.output_dir={here}", "train.max_steps=3"]
    assert main([*words, "--resume"]) == 2
    said = capsys.readouterr().err
    assert "train.max_steps was 2 and is 3. A run keeps its length" in said
    found = re.search(
        r"To train longer, begin another run: save.output_dir=FOLDER, and (\S+ \S+) ", said
    )
    assert found is not None
    new = tmp_path / "new"
    assert main([*words, *found[1].split(), f"save.output_dir={new}"]) == 0
    assert (new / "adapter").is_dir()


def test_validate_tells_a_folder_that_holds_a_run(run, stopped, capsys):
    here, _ = run
    words = ["validate", str(stopped / "run.yaml"), f"save.output_dir={here}"]
    assert main([*words, "train.warmup_steps=9"]) == 0
    printed = capsys.readouterr().out
    assert f"WARNING: save.output_dir: {here} holds a run: `lorax train` needs --resume" in printed
    assert "WARNING: train.warmup_steps: the warm-up takes 9 steps and the run has 2" in printed
    assert main([*words[:2], f"save.output_dir={here}-new"]) == 0
    assert "WARNING" not in capsys.readouterr().out
