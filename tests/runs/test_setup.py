"""A run finds out once what it is made of, and hands it on."""

import fnmatch
import json
import shutil
import threading
from collections import Counter
from pathlib import Path

import pytest

from lorax.cli.main import main
from lorax.data.batches import Batches
from lorax.interop import folder as interop_folder
from lorax.interop import load as interop_load
from lorax.recovery import files as recovery_files
from lorax.recovery import identity as recovery_identity
from lorax.recovery import store as recovery_store
from lorax.runs import model as runs_model
from lorax.runs import run as runs_run
from lorax.system.threads import finish_in_background
from lorax.training import course as training_course
from tests.tiny import shallow_model

pytestmark = pytest.mark.slow

TINY = Path(__file__).parents[2] / "examples" / "tiny"


@pytest.fixture
def run(tmp_path, capsys):
    """Runs a command on a few rows of the example; returns its exit code and what it printed."""
    rows = (TINY / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[:6]), encoding="utf-8")
    (tmp_path / "held.jsonl").write_text("".join(rows[6:9]), encoding="utf-8")
    config = {
        "model": {"name_or_path": str(shallow_model()), "dtype": "float32"},
        "data": {
            "train": str(tmp_path / "rows.jsonl"),
            "eval": str(tmp_path / "held.jsonl"),
            "max_seq_length": 128,
        },
        "train": {"max_steps": 1, "gradient_checkpointing": "auto", "memory_gib": 100},
        "save": {"output_dir": str(tmp_path / "run")},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config), encoding="utf-8")

    def call(*words):
        code = main([words[0], str(tmp_path / "run.yaml"), *words[1:]])
        return code, "".join(capsys.readouterr())

    yield call
    for name in ("files", "weights", "compile"):  # of runs that were refused
        finish_in_background(name)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one model, of which a file is there once it was asked for; returns who asked."""
    folder, asked = tmp_path / "hub" / "snapshots" / ("c" * 40), []

    def download(name, *, revision, allow_patterns):
        asked.append((revision, any(p.endswith(".safetensors") for p in allow_patterns)))
        folder.mkdir(parents=True, exist_ok=True)
        for path in shallow_model().iterdir():
            wanted = any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns)
            if wanted and not (folder / path.name).exists():
                shutil.copy(path, folder)
        return str(folder)

    monkeypatch.setattr(interop_folder.huggingface_hub, "snapshot_download", download)
    return folder, asked


@pytest.fixture
def counted(monkeypatch):
    """What was found out, and how often, by what it is and of what."""
    found = Counter()

    def count(owner, name, what):
        function = getattr(owner, name)

        def counting(*arguments, **keywords):
            found.update(what(*arguments, **keywords))
            return function(*arguments, **keywords)

        monkeypatch.setattr(owner, name, counting)

    inside = lambda path: "run" not in path.parts[-3:]  # what a run wrote it reads back
    count(
        Batches,
        "__init__",
        lambda _, rows, **settings: [f"{len(rows)} rows packed, shuffled: {settings['shuffle']}"],
    )
    find = interop_folder.read_headers

    def read_headers(paths, **options):
        paths = list(paths)
        found.update(f"header of {path.name}" for path in paths if inside(path))
        return find(paths, **options)

    monkeypatch.setattr(interop_folder, "read_headers", read_headers)
    count(interop_load, "read_config", lambda path: ["config.json"] if inside(path) else [])
    for module in (training_course, runs_model):
        count(module, "make_mesh", lambda *_: ["mesh"])
    for module in (recovery_files, recovery_store):
        count(module, "read_manifest", lambda path: [f"manifest of {path.name}"])
    compared = lambda saved, now, *_: [f"{part} compared" for part in saved.keys() | now.keys()]
    count(recovery_identity, "refuse_other_run", compared)
    rows = lambda data: [f"{len(data)} rows hashed"]
    count(recovery_identity, "fingerprint_data", rows)
    return found


ONCE = {
    "6 rows packed, shuffled: True",
    "3 rows packed, shuffled: False",
    "header of model.safetensors",
    "config.json",
    "mesh",
    "6 rows hashed",
    "3 rows hashed",
}
PARTS = {
    "settings",
    "devices",
    "gradient checkpointing",
    "training data",
    "held-out data",
    "tokenizer",
    "base model",
    "adapter settings",
}


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_a_run_looks_once_and_so_does_one_that_goes_on(run, hub, counted, monkeypatch, where):
    _, asked = hub
    settings = [] if where == "folder" else ["model.name_or_path=owner/model"]

    def stop(*_, **__):
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("lorax.runs.exports.export_model", stop)
        code, printed = run("train", *settings)
    assert code == 2 and "no room" in printed
    assert counted == dict.fromkeys(ONCE, 1)
    fetched = [(None, False), ("c" * 40, True)]  # what it is, then the weights of that commit
    assert asked == ([] if where == "folder" else fetched)
    counted.clear()
    asked.clear()
    code, printed = run("train", "--resume", *settings)
    assert code == 0, printed
    again = {"manifest of step-000000001"} | {f"{part} compared" for part in PARTS | {"adapter"}}
    assert counted == dict.fromkeys(ONCE | again, 1)
    assert asked == ([] if where == "folder" else fetched)


@pytest.mark.parametrize("command", ["validate", "plan", "inspect"])
def test_the_shorter_roads_look_once_too(run, counted, command):
    code, printed = run(command)
    assert code == 0, printed
    assert set(counted.values()) == {1} and counted.keys() <= ONCE


def test_weights_from_the_hub_come_beside_the_compiler(run, hub, monkeypatch):
    download, compiles = interop_folder.huggingface_hub.snapshot_download, threading.Event()
    begin, waited = runs_run.compile_ahead, []

    def slow(name, *, revision, allow_patterns):
        if any(pattern.endswith(".safetensors") for pattern in allow_patterns):
            waited.append(compiles.wait())  # for ever, if the run waits for the weights first
        return download(name, revision=revision, allow_patterns=allow_patterns)

    def tell(*arguments, **keywords):
        compiles.set()
        return begin(*arguments, **keywords)

    monkeypatch.setattr(interop_folder.huggingface_hub, "snapshot_download", slow)
    monkeypatch.setattr(runs_run, "compile_ahead", tell)
    code, printed = run("train", "model.name_or_path=owner/model")
    assert code == 0, printed
    assert waited == [True]


def test_a_run_does_not_go_on_with_other_weights_from_the_hub(run, hub, monkeypatch):
    folder, _ = hub

    def stop(*_, **__):
        raise OSError("no room")

    name = "model.name_or_path=owner/model"
    with monkeypatch.context() as patch:
        patch.setattr("lorax.runs.exports.export_model", stop)
        assert run("train", name)[0] == 2
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, printed = run("train", "--resume", name)
    assert code == 2 and "cannot be resumed as another run: the base model changed." in printed
