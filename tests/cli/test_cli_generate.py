"""What generate answers on the shipped tiny model and on a run."""

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lorax.cli.main import main
from tests.cli.runs import MODEL, PROMPT

pytestmark = pytest.mark.slow


def test_a_run_generates_with_its_adapter(trained, monkeypatch, lorax_prints):
    prompt = ("--prompt", PROMPT, "--max-new-tokens", "8", "--dtype", "float32")
    plain = lorax_prints("generate", MODEL, *prompt)
    adapted = lorax_prints("generate", MODEL, "--adapter", trained / "adapter", *prompt)
    assert lorax_prints("generate", trained, *prompt) == adapted
    assert plain.strip() and plain != adapted  # three steps at a rate of 0.03 change the answer


def test_a_base_that_was_moved_is_named_by_the_remedy(trained, tmp_path, lorax_prints, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    settings = (run / "config.yaml").read_text(encoding="utf-8")
    assert str(MODEL) in settings
    moved = settings.replace(str(MODEL), "./was/here")
    (run / "config.yaml").write_text(moved, encoding="utf-8")
    prompt = ("--prompt", PROMPT, "--max-new-tokens", "4", "--dtype", "float32")
    for command, remedy in (
        (("generate", run, *prompt), f"in the place of the run's, with --adapter {run}/adapter"),
        (("export", run, "--format", "peft", "--out", tmp_path / "a"), "folder with --base"),
    ):
        assert main([str(word) for word in command]) == 2
        said = capsys.readouterr().err
        assert f"config.yaml: ./was/here: no such folder in {Path.cwd()}" in said
        assert remedy in said
    adapted = lorax_prints("generate", trained, *prompt)
    assert lorax_prints("generate", MODEL, "--adapter", run / "adapter", *prompt) == adapted
    words = ("export", run, "--format", "peft", "--out", tmp_path / "b", "--base", MODEL)
    assert main([str(word) for word in words]) == 0
    assert (tmp_path / "b" / "adapter_model.safetensors").is_file()


def test_the_shipped_model_answers_every_prompt_alone_as_together(lorax_prints):
    other = "The radio is green, made of steel, in aisle 4."
    settings = ("--max-new-tokens", "6", "--dtype", "float32")
    both = lorax_prints("generate", MODEL, "--prompt", PROMPT, "--prompt", other, *settings)
    alone = [lorax_prints("generate", MODEL, "--prompt", p, *settings) for p in (PROMPT, other)]
    heads = (f'[{i}/2] "{text}"\n' for i, text in enumerate((PROMPT, other), start=1))
    assert both == "\n".join(head + answer for head, answer in zip(heads, alone, strict=True))
    assert lorax_prints("generate", MODEL, "--prompt", PROMPT, *settings) == alone[0]


def test_sampling_is_decided_by_its_seed(lorax_prints):
    arguments = ("generate", MODEL, "--raw", "--prompt", "The", "--temperature", "2.0")
    arguments = (*arguments, "--top-k", "50", "--max-new-tokens", "16")
    first, again, other = (lorax_prints(*arguments, "--seed", seed) for seed in (1, 1, 2))
    assert first == again != other


def test_a_prompt_may_come_from_stdin(monkeypatch, lorax_prints):
    settings = ("--max-new-tokens", "6")
    expected = lorax_prints("generate", MODEL, "--prompt", PROMPT, *settings)
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT + "\n"))
    assert lorax_prints("generate", MODEL, *settings) == expected


HEARS = """
import gc, os, signal, sys, time
from lorax.cli import train
from lorax.system.signals import RunStopped
train._stop_when_asked()
sent = []


def collected(phase, _):
    if not sent:
        sent.append(phase)
        os.kill(os.getpid(), signal.SIGTERM)
        sum(range(1000))  # the handler runs here, and what it raises is discarded


gc.callbacks.append(collected)
try:
    gc.collect()
    while True:  # who does not hear it stays here
        time.sleep(0.1)
except RunStopped as stopped:
    print(stopped)
"""


def test_a_signal_that_comes_while_garbage_is_collected_is_heard():
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'kernels'}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", HEARS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("stopped by SIGTERM while it did not train"), done.stderr
    assert not done.stderr
