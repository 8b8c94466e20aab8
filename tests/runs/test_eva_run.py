"""A run that begins with EVA, and goes on with the ranks that it came to."""

import json
import shutil

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

import lorax
from lorax.adapters.nnx.eva import ranks_of
from lorax.config.run import load_config
from lorax.interop.peft_config import read_adapter_config
from lorax.runs import eva
from lorax.runs.model import Blueprint
from lorax.runs.run import run_training
from lorax.runs.setup import Setup, build_model
from tests.tiny import shallow_model

pytestmark = pytest.mark.slow

SETTINGS = [
    "lora.init_lora_weights=eva",
    "lora.eva_config.tau=0.9",
    "lora.r=4",
    "lora.target_modules=[q_proj, o_proj, down_proj]",
    "train.max_steps=3",
    "eval.exact_match=false",
    "data.eval=[]",
    "eval.strategy=no",
    "save.export=[peft]",
    "save.save_steps=1",
    "save.save_total_limit=3",
]


def config(folder, *more):
    base = f"model.name_or_path={shallow_model(1)}"
    settings = [f"save.output_dir={folder}", base, *SETTINGS, *more]
    return load_config("configs/tiny_cpu.yaml", settings)


def train(folder, *more, **options):
    run_training(config(folder, *more), Console(quiet=True), **options)
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_run_begins_with_eva_and_goes_on_bit_for_bit(tmp_path, monkeypatch):
    run = tmp_path / "run"
    weights = train(run)
    ranks = {len(v) for k, v in weights.items() if "lora_A" in k}
    assert len(ranks) > 1 and sum(len(v) for k, v in weights.items() if "lora_A" in k) == 12
    assert read_adapter_config(run / "adapter").rank_pattern
    for path in ("adapter", "checkpoints/step-000000003", "weights/step-000003"):
        shutil.rmtree(run / path)
    (run / "summary.json").unlink()
    # What it goes on with is in its checkpoint.
    monkeypatch.setattr(eva, "initialize_eva", None)
    again = train(run, resume="always")
    assert again.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(again[name], value)
    manifest = json.loads((run / "checkpoints/step-000000003/manifest.json").read_text())
    assert manifest["record"]["progress"]["notes"][eva.RANKS]
    # The config that a run keeps is that of a run that begins with EVA too.
    kept = load_config(run / "config.yaml")
    assert kept.lora == config(run).lora


def test_it_begins_on_the_micro_batches_of_training(tmp_path, monkeypatch):
    seen = []

    def note(model, config, batches, *, rngs):
        seen.extend(batches)
        raise ZeroDivisionError

    monkeypatch.setattr(eva, "initialize_eva", note)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "run")
    setup = Setup.of(Blueprint.of(config(tmp_path / "run")))
    expected = [
        {name: value[index] for name, value in step.items()}
        for step in setup.course.batches.epoch(0)
        for index in range(2)
    ]
    assert len(seen) == len(expected) > 2
    for ours, theirs in zip(seen, expected, strict=True):
        assert ours.keys() == theirs.keys() >= {"input_ids", "labels", "positions", "segment_ids"}
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_model_without_its_run_names_what_to_call(tmp_path):
    with pytest.raises(ValueError, match=r"call lorax\.initialize_eva\(model, config, batches"):
        build_model(config(tmp_path / "run"))
    model = lorax.load_model(shallow_model(1))
    settings = config(tmp_path / "run").lora
    batch = {"input_ids": np.arange(60, dtype=np.int32).reshape(2, 30)}  # the remedy
    assert sum(ranks_of(lorax.initialize_eva(model, settings, [batch], rngs=0)).values()) == 12
