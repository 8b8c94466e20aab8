"""Steps compiled from shapes, and what is told of the time before the first one."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import lorax
from lorax.objectives.objectives import as_objective
from lorax.runs.model import Blueprint
from lorax.runs.setup import Setup
from lorax.system.clock import Phases, process_age
from lorax.training.ahead import compile_ahead
from tests.tiny import shallow_model

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy, overrides",
    [
        ("none", ["lora.lora_dropout=0.1", "lora.use_rslora=true"]),
        ("offload", ["data.packing=false"]),
        ("offload", ["data.packing=false", "train.kept_layers=2"]),
        ("offload", ["train.method=full", "lora=null", "save.export=[merged]"]),
    ],
)
def test_a_step_compiled_from_shapes_trains_as_one_compiled_from_weights(
    policy, overrides, tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    settings = ["train.max_steps=2", "eval.strategy=no", "eval.exact_match=false", *overrides]
    settings += [f"model.name_or_path={shallow_model(3)}"]
    settings += [f"train.gradient_checkpointing={policy}", f"save.output_dir={tmp_path}/run"]
    config = lorax.load_config("configs/tiny_cpu.yaml", settings)
    setup = Setup.of(Blueprint.of(config))
    shapes = setup.blueprint.shapes
    setup.recomputation[0].put_on(shapes)
    ahead = compile_ahead(shapes, setup.course)
    results = []
    for compiled in (ahead, None):
        events = []
        trainer = lorax.Trainer(
            lorax.build_model(config),
            config,
            setup.train,
            setup.eval,
            listeners=(events.append,),
            compiled=compiled,
        )
        trainer.train()
        losses = [event["loss"] for event in events if "loss" in event]
        results.append((losses, jax.tree.leaves(nnx.state(trainer.model, nnx.Param))))
        for path in sorted((tmp_path / "run").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
    assert results[0][0] == results[1][0]
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_an_error_of_the_compiling_thread_reaches_the_trainer(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = ["train.max_steps=1", "eval.strategy=no", f"save.output_dir={tmp_path}/run"]
    config = lorax.load_config("configs/tiny_cpu.yaml", settings)
    setup = Setup.of(Blueprint.of(config))

    def broken(*_):
        raise ArithmeticError("broken loss")

    course = dataclasses.replace(setup.course, objective=as_objective(broken))
    ahead = compile_ahead(setup.blueprint.shapes, course)
    trainer = lorax.Trainer(lorax.build_model(config), config, setup.train, compiled=ahead)
    with pytest.raises(ArithmeticError, match="broken loss"):
        trainer.train()


def test_phases_add_up_by_name_and_begin_with_the_process():
    before = process_age() or 0.0
    phases = Phases(before)
    for name in ("imports", "weights", "weights"):
        phases.end(name)
    found = re.fullmatch(r"([\d.]+) s: imports ([\d.]+), weights ([\d.]+)", str(phases))
    assert found
    total, imports, weights = map(float, found.groups())
    # Each is told to a tenth of a second.
    assert before - 0.1 <= imports <= total <= (process_age() or 0.0) + 0.1
    assert total == pytest.approx(imports + weights, abs=0.151)
