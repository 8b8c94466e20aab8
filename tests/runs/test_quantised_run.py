"""A run on a quantised base, from its setting to its exports, and a checkpoint to go on from."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import lorax
from lorax.cli import generate
from lorax.cli.main import main
from lorax.interop.load import load_model
from lorax.runs.model import Blueprint
from lorax.runs.run import run_training
from lorax.weights.int8 import INT8
from lorax.weights.nf4 import NF4, NF4_DOUBLE
from lorax_kernels.weights.int8 import Int8
from lorax_kernels.weights.nf4 import Nf4
from tests.bounds import distance
from tests.tiny import write_model

pytestmark = pytest.mark.slow

FORMATS = {"nf4": NF4, "nf4_double": NF4_DOUBLE, "int8": INT8}
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("base") / "model")


def settings(home, base, quantization, **train):
    rows = home / "rows.jsonl"
    rows.write_text(4 * (json.dumps({"prompt": "a", "completion": "b c"}) + "\n"))
    return lorax.RunConfig.model_validate(
        {
            "model": {
                "name_or_path": str(base),
                "dtype": "float32",
                "quantization": quantization,
            },
            "lora": {"r": 2, "target_modules": ["q_proj", "up_proj", "down_proj"]},
            "data": {"train": str(rows), "max_seq_length": 32},
            "train": {"per_device_train_batch_size": 4, "max_steps": 4} | train,
            "save": {
                "output_dir": str(home / "run"),
                "save_steps": 2,
                "export": ["peft", "merged"],
            },
        }
    )


@pytest.mark.parametrize("quantization", FORMATS)
def test_a_run_trains_on_it_and_its_exports_are_of_what_trained(base, tmp_path, quantization):
    config = settings(tmp_path, base, quantization)
    shapes = Blueprint.of(config).shapes
    kind = type(shapes.model.layers[0].mlp.gate_proj.kernel.get_value())
    assert kind is (Int8 if quantization == "int8" else Nf4)
    summary = run_training(config, Console(quiet=True))  # which reads back what it exports
    assert summary.steps == 4
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    words = f"bnb_4bit_use_double_quant={quantization == 'nf4_double'}"
    assert (words in card) == (quantization != "int8")
    # A matrix without an adapter is exported as the values that were multiplied by.
    format = FORMATS[quantization]
    exact = load_model(base, dtype=jnp.float32).model.layers[0].mlp.gate_proj.kernel.get_value()
    merged = load_model(tmp_path / "run" / "merged", dtype=jnp.float32)
    got = merged.model.layers[0].mlp.gate_proj.kernel.get_value()
    np.testing.assert_array_equal(got, format.dense(format.store(exact)))
    assert 0 < distance(got, exact) < (0.01 if quantization == "int8" else 0.2)


def test_shapes_are_known_without_weights(base, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    shapes = Blueprint.of(settings(tmp_path, folder, "nf4")).shapes
    assert isinstance(shapes.model.layers[1].self_attn.k_proj.kernel.get_value(), Nf4)


def test_a_resumed_run_goes_on_and_another_format_is_refused(base, tmp_path, capsys, monkeypatch):
    whole = settings(tmp_path, base, "nf4_double")
    run_training(whole, Console(quiet=True))
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    shutil.copytree(tmp_path / "run" / "checkpoints", stopped / "run" / "checkpoints")
    shutil.rmtree(stopped / "run" / "checkpoints" / "step-000000004")
    again = settings(stopped, base, "nf4_double")
    run_training(again, Console(quiet=True), resume="always")
    name = "adapter/adapter_model.safetensors"
    assert (stopped / "run" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    with pytest.raises(ValueError, match=r"model\.quantization"):
        run_training(settings(stopped, base, "nf4"), Console(quiet=True), resume="always")
    # Answers are of the model that trained: `load_model` with the run's format.
    asked = []
    original = generate.load_model
    monkeypatch.setattr(
        generate, "load_model", lambda *a, **k: (asked.append(k["format"]), original(*a, **k))[1]
    )
    assert main(["generate", str(stopped / "run"), "--prompt", "a", "--max-new-tokens", "4"]) == 0
    assert asked == [NF4_DOUBLE] and capsys.readouterr().out
