"""Checkpoints: read and written as transformers does, and nothing doubtful is loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors import safe_open

from lorax.interop.folder import find_tensors, write_checkpoint
from lorax.interop.load import load_model
from lorax.interop.safetensors import read_tensors
from lorax.interop.save import model_tensors, save_model
from lorax.interop.tensors import hf_name, tensor_table
from lorax.models.decoder import CausalLM, init_model
from lorax.models.families import read_architecture
from lorax.system.files import CheckpointError
from tests.tiny import SMALL

pytestmark = pytest.mark.slow

FAMILIES = {
    "llama": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "llama-tied": ("Llama", dict(tie_word_embeddings=True)),
    "mistral": ("Mistral", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", dict(head_dim=16)),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Q0 = "model.layers.0.self_attn.q_proj.weight"


def reference_model(family="Llama", settings=None, dtype=torch.bfloat16):
    config = getattr(transformers, f"{family}Config")(**SMALL | (settings or {}))
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model.to(dtype)


def contents(directory):
    """Returns (dtype, shape, bytes) of every tensor of a checkpoint."""
    found = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():
                value = file.get_tensor(name)
                found[name] = (file.get_slice(name).get_dtype(), value.shape, value.tobytes())
    return found


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("original") / "model"
    reference_model().save_pretrained(path)
    return path


@pytest.fixture
def folder(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", FAMILIES)
def test_loading_and_saving_gives_the_same_bytes(case, dtype, tmp_path):
    family, settings = FAMILIES[case]
    reference_model(family, settings, DTYPES[dtype]).save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs", dtype=jnp.dtype(dtype))
    save_model(model, tmp_path / "ours", dtype=jnp.dtype(dtype))
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")
    with safe_open(tmp_path / "ours" / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("case", FAMILIES)
def test_transformers_loads_what_lorax_saved_in_shards(case, tmp_path):
    family, settings = FAMILIES[case]
    config = getattr(transformers, f"{family}Config")(**SMALL | settings).to_dict()
    model = init_model(read_architecture(config, "here"), dtype=jnp.float32, seed=3)
    save_model(model, tmp_path / "m", dtype=jnp.float32, max_shard_bytes=20_000)
    shards = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", output_loading_info=True
    )
    theirs, report = loaded
    assert type(theirs).__name__ == f"{family}ForCausalLM"
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    ids = np.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(model(jnp.asarray(ids)), expected, atol=1e-5, rtol=1e-5)
    again = load_model(tmp_path / "m", dtype=jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))


def test_weights_take_the_dtype_asked_for(original):
    model = load_model(original, dtype=jnp.bfloat16, param_dtype=jnp.float32)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    assert model.hidden_states(jnp.zeros((1, 3), jnp.int32)).dtype == jnp.bfloat16


def test_names_of_parameters_and_tensors_are_one_to_one():
    config = read_architecture(dict(SMALL, model_type="qwen3", attention_bias=True), "here")
    reference = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**SMALL, attention_bias=True)
    )
    theirs = {name: tuple(value.shape) for name, value in reference.state_dict().items()}
    table = tensor_table(config)
    assert {name: spec.shape for name, spec in table.items()} == theirs
    assert len({spec.path for spec in table.values()}) == len(table)
    assert all(hf_name(spec.path) == (name, spec.transpose) for name, spec in table.items())
    assert hf_name(("model", "layers", 0, "self_attn", "q_proj", "kernel")) == (Q0, True)
    with pytest.raises(ValueError, match=r"q_proj\.lora_a has no place .* merge adapters first"):
        hf_name(("model", "q_proj", "lora_a"))


def test_overrides_replace_tensors_and_may_be_made_late(original, tmp_path):
    model = load_model(original)
    kernel = jnp.ones((32, 32), jnp.float32) * jnp.arange(32, dtype=jnp.float32)[None, :]
    save_model(model, tmp_path / "m", overrides={Q0: lambda: kernel})
    changed = load_model(tmp_path / "m").model.layers[0].self_attn.q_proj.kernel[...]
    np.testing.assert_array_equal(changed.astype(jnp.float32), kernel)
    # A parameter that is elsewhere, as under an adapter, must be overridden.
    model.model.layers[0].self_attn.q_proj = nnx.Sequential(nnx.Linear(32, 32, rngs=nnx.Rngs(0)))
    assert Q0 in dict(model_tensors(model, overrides={Q0: kernel}))
    with pytest.raises(ValueError, match=r"has no model\.layers\.0\.self_attn\.q_proj\.kernel"):
        dict(model_tensors(model))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.norm.bias": jnp.ones(32)}, r"overrides name model\.norm\.bias"),
        ({"model.norm.weight": jnp.ones(31)}, r"would have shape \(31,\); .* needs \(32,\)"),
    ],
)
def test_overrides_that_do_not_fit_are_refused(original, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        save_model(load_model(original), tmp_path / "m", overrides=overrides)
    assert not (tmp_path / "m").exists() and not list(tmp_path.iterdir())


def test_what_travels_with_the_weights_is_copied(original, folder, tmp_path):
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (folder / name).write_text(name)
    (folder / "private.txt").write_text("stays")
    save_model(load_model(original), tmp_path / "m", source_directory=folder)
    assert (tmp_path / "m" / "chat_template.jinja").read_text() == "chat_template.jinja"
    assert (tmp_path / "m" / "generation_config.json").read_text() == "generation_config.json"
    assert not (tmp_path / "m" / "private.txt").exists()


def test_a_folder_that_holds_something_is_never_overwritten(original, folder):
    before = contents(folder)
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        save_model(load_model(original), folder)
    assert contents(folder) == before


def test_an_empty_folder_is_filled_and_a_failure_leaves_nothing(tmp_path):
    (tmp_path / "m").mkdir()

    def breaks():
        yield "a", np.ones(3, np.float32)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(breaks(), {}, tmp_path / "m")
    assert list(tmp_path.rglob("*")) == [tmp_path / "m"]
    write_checkpoint([("a", np.ones(3, np.float32))], {}, tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_the_index_lists_every_tensor_and_their_size(tmp_path):
    values = [(f"t{i}", np.full((4,), i, np.float32)) for i in range(5)]
    write_checkpoint(values, {}, tmp_path / "m", max_shard_bytes=32)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 80}
    assert index["weight_map"]["t4"] == "model-00003-of-00003.safetensors"
    assert {k: e.file.name for k, e in find_tensors(tmp_path / "m").items()} == index["weight_map"]
    with pytest.raises(ValueError, match="t0 is given twice"):
        write_checkpoint([*values, values[0]], {}, tmp_path / "n", max_shard_bytes=32)


def test_transposed_arrays_are_written_in_their_own_order(tmp_path):
    value = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write_checkpoint([("a", value)], {}, tmp_path / "m")
    ((_, _, read),) = read_tensors([tmp_path / "m" / "model.safetensors"])
    np.testing.assert_array_equal(read, value)


def test_fresh_models_follow_the_seed():
    config = read_architecture(dict(SMALL, model_type="llama"), "here")
    kernel = lambda seed: init_model(config, seed=seed).model.layers[1].mlp.up_proj.kernel[...]
    assert kernel(0).dtype == jnp.bfloat16
    assert (kernel(0) == kernel(0)).all() and not (kernel(0) == kernel(1)).all()
    assert float(kernel(0).astype(jnp.float32).std()) == pytest.approx(0.02, rel=0.1)
    assert isinstance(init_model(config), CausalLM)
