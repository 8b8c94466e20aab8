"""The changed base and its adapter of rank r, as transformers and PEFT load the pair."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorax
from lorax.adapters.nnx.merge import with_starts
from lorax.adapters.nnx.tree import adapted_layers
from lorax.cli.main import main
from lorax.interop.export import export_model
from lorax.interop.load import load_model
from tests.bounds import distance
from tests.tiny import write_model

pytestmark = pytest.mark.slow

IDS = np.random.default_rng(1).integers(0, 512, (2, 12))
LINEAR = ["q_proj", "v_proj", "down_proj"]
SETTINGS = {
    "PiSSA": {"init_lora_weights": "pissa"},
    "randomised PiSSA": {"init_lora_weights": "pissa_niter_2", "use_rslora": True},
    "OLoRA": {"init_lora_weights": "olora", "rank_pattern": {"v_proj": 2}},
    "DoRA": {"init_lora_weights": "pissa", "use_dora": True},
    "lora_bias": {"init_lora_weights": "olora", "lora_bias": True},
    "an embedding": {"init_lora_weights": "pissa", "target_modules": [*LINEAR, "embed_tokens"]},
    "tokens": {"init_lora_weights": "pissa", "trainable_token_indices": [3, 5]},
    "whole modules": {"init_lora_weights": "olora", "modules_to_save": ["norm", "lm_head"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("base") / "model")


def trained(base, **settings):
    """A model whose every trained value differs from its first one."""
    config = lorax.LoraConfig(r=4, lora_alpha=6, **{"target_modules": LINEAR, **settings})
    model = lorax.apply_lora(load_model(base, dtype=jnp.float32), config, rngs=0)
    state = nnx.state(model, nnx.Param)
    draws = iter(jax.random.split(jax.random.key(3), 99))
    moved = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(next(draws), x.shape), state)
    nnx.update(model, moved)
    return model


def logits_in_peft(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of keys that are missing, or one too many
        warnings.simplefilter("ignore", FutureWarning)  # within these libraries
        warnings.filterwarnings("ignore", "`lora_bias=True` was passed but the targeted layer")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(model, str(folder / "adapter"))
    with torch.no_grad():
        return model(torch.from_numpy(IDS)).logits.numpy()


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_pair_computes_in_peft_what_was_trained(kind, base, tmp_path):
    model = trained(base, **SETTINGS[kind])
    got = model(jnp.asarray(IDS, jnp.int32))
    plain = load_model(base, dtype=jnp.float32)
    assert distance(got, plain(jnp.asarray(IDS, jnp.int32))) > 0.02
    folder = tmp_path / "rebased"
    export_model(model, folder, "rebased", base=base, card="A card.")
    assert distance(logits_in_peft(folder), np.asarray(got)) <= 1e-4
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (4, True)
    assert config["base_model_name_or_path"] == str(folder)
    assert (folder / "README.md").read_text() == "A card."
    assert AutoTokenizer.from_pretrained(folder).encode("a") == [
        *AutoTokenizer.from_pretrained(base).encode("a")
    ]
    # The base without its adapter has lost what the adapters began with.
    changed = load_model(folder, dtype=jnp.float32)
    w, w0 = (m.model.layers[0].self_attn.q_proj.kernel[...] for m in (changed, plain))
    first = model.model.layers[0].self_attn.q_proj.adapter.values
    s = model.model.layers[0].self_attn.q_proj.adapter.spec.scale
    product = np.asarray(first["first_a"], np.float64) @ np.asarray(first["first_b"], np.float64)
    assert distance(w, np.asarray(w0) - s * product) <= 1e-6


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal"])
def test_what_changes_no_base_is_refused(start, base, tmp_path):
    model = trained(base, init_lora_weights=start)
    with pytest.raises(ValueError, match=r"set lora\.init_lora_weights to pissa or olora, or expo"):
        export_model(model, tmp_path / "out", "rebased", base=base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_saved_adapter_knows_again_what_it_began_with(kind, base, tmp_path):
    model = trained(base, **SETTINGS[kind])
    lorax.save_adapter(model, tmp_path / "plain")
    again = lorax.load_adapter(load_model(base, dtype=jnp.float32), tmp_path / "plain")
    settings = {"target_modules": LINEAR, **SETTINGS[kind]}
    begun = with_starts(again, lorax.LoraConfig(r=4, lora_alpha=6, **settings))
    mine, theirs = (adapted_layers(m) for m in (begun, model))
    assert mine.keys() == theirs.keys()
    for name, layer in mine.items():
        expected = theirs[name].adapter
        assert layer.adapter.spec.scale == pytest.approx(expected.spec.scale, rel=1e-12)
        assert layer.adapter.spec.r == expected.spec.r
        assert layer.adapter.values.keys() == expected.values.keys()
        for key, value in expected.values.items():
            np.testing.assert_array_equal(layer.adapter.values[key], value)


def test_a_run_and_lorax_export_write_the_same_pair(base, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(4 * (json.dumps({"prompt": "a b", "completion": "c d"}) + "\n"))
    config = {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "lora": {"r": 4, "target_modules": LINEAR, "init_lora_weights": "pissa"},
        "data": {"train": str(rows), "max_seq_length": 32},
        "train": {"max_steps": 2, "learning_rate": 0.01},
        "save": {"output_dir": str(tmp_path / "run"), "export": ["rebased"]},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    refused = ["train", str(tmp_path / "run.yaml"), "lora.init_lora_weights=true"]
    assert main(refused) == 2 and not (tmp_path / "run").exists()
    assert "save.export: rebased holds a base without" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    folder = tmp_path / "run" / "rebased"
    card = (folder / "README.md").read_text()
    assert "path/to/this/folder/adapter" in card and "Format: `rebased`" in card
    plain = lorax.load_adapter(load_model(base, dtype=jnp.float32), tmp_path / "run" / "adapter")
    got = np.asarray(plain(jnp.asarray(IDS, jnp.int32)))
    assert distance(logits_in_peft(folder), got) <= 1e-4
    out = tmp_path / "out"
    for source in (tmp_path / "run", tmp_path / "run" / "adapter"):
        words = ["--format", "rebased", "--out", str(out), "--dtype", "float32"]
        assert main(["export", str(source), *words]) == 0
        for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
            mine, theirs = load_file(out / name), load_file(folder / name)
            assert mine.keys() == theirs.keys()
            assert all(np.array_equal(mine[key], theirs[key]) for key in mine)
        out = tmp_path / "again"
    # An adapter that lies elsewhere does not say what it began with.
    (tmp_path / "run" / "adapter").rename(tmp_path / "moved")
    words = ["export", str(tmp_path / "moved"), "--format", "rebased", "--out", str(tmp_path / "x")]
    capsys.readouterr()
    assert main(words) == 2
    assert "init_lora_weights is no pissa and no olora" in capsys.readouterr().err
