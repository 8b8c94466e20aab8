"""`initialize_eva` on language models: which tokens count, and what PEFT comes to."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from transformers import LlamaConfig, LlamaForCausalLM

import lorax
from lorax.adapters.nnx.eva import counted_tokens, ranks_of
from lorax.adapters.nnx.recorder import carriers_of, readers_of_one_input
from lorax.adapters.nnx.tree import adapted_layers, named_modules
from lorax.models.decoder import CausalLM
from lorax.models.families import read_architecture
from tests.bounds import distance
from tests.tiny import LLAMA

pytestmark = pytest.mark.filterwarnings("ignore")


def language_model(**settings):
    return CausalLM(read_architecture(LLAMA | settings, "small"), rngs=nnx.Rngs(0))


def test_layers_of_one_input_are_found():
    model = nnx.clone(language_model())
    names = [n for n in named_modules(model) if n.endswith("_proj")]
    groups = readers_of_one_input(
        model, carriers_of(model, names), CausalLM.__call__, np.zeros((1, 4), np.int32)
    )
    last = [[name.split(".")[-1] for name in group] for group in groups]
    assert sorted(map(sorted, last)) == sorted(
        2 * [["gate_proj", "up_proj"], ["down_proj"], ["k_proj", "q_proj", "v_proj"], ["o_proj"]]
    )


def test_a_language_model_begins_as_with_peft(tmp_path):
    torch.manual_seed(0)
    shape: dict[str, Any] = {k: v for k, v in LLAMA.items() if k != "model_type"}
    base = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    random = np.random.default_rng(0)
    with torch.no_grad():  # inputs that vary less and less from direction to direction
        base.model.embed_tokens.weight *= torch.tensor(0.6 ** np.arange(32)).float() * 50
    base.save_pretrained(tmp_path / "base")
    ids = random.integers(0, 64, (4, 24))
    labels = np.where(random.random(ids.shape) < 0.6, ids, -100)
    labels[:, 0] = -100
    names = ["q_proj", "down_proj"]
    settings: dict[str, Any] = {"r": 3, "target_modules": names, "init_lora_weights": "eva"}
    theirs: Any = get_peft_model(base, LoraConfig(**settings, eva_config=EvaConfig(rho=1.0)))
    batch = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
    initialize_lora_eva_weights(theirs, 2 * [batch], show_progress_bar=False)
    shifted = np.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
    config = lorax.LoraConfig(**settings, eva_config={"rho": 1.0})  # pyright: ignore
    given = {"input_ids": ids.astype(np.int32), "labels": shifted.astype(np.int32)}
    model = lorax.load_model(tmp_path / "base", dtype=jnp.float32)
    ours = lorax.initialize_eva(model, config, 2 * [given], rngs=0)
    for name, layer in adapted_layers(ours).items():
        a = theirs.base_model.model.get_submodule(name).lora_A["default"].weight.detach().numpy()
        assert distance(layer.adapter.params["lora_a"], a.T) <= 1e-2, name
    np.testing.assert_array_equal(ours(given["input_ids"]), model(given["input_ids"]))


def test_tokens_that_count_are_learned_or_no_padding():
    labels = jnp.array([[-100, 7, 8, -100, -100], [-100, -100, -100, -100, -100]])
    positions = jnp.array([[0, 1, 2, 3, 0], [0, 0, 0, 0, 0]])
    segments = jnp.array([[1, 1, 2, 2, 0], [0, 0, 0, 0, 0]])
    batch = {"input_ids": labels, "labels": labels, "positions": positions}
    learned = [[0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]
    tokens = [[1, 1, 1, 1, 0], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(counted_tokens(batch, learned=True), learned)
    np.testing.assert_array_equal(counted_tokens(batch, learned=False), tokens)
    packed = batch | {"segment_ids": segments, "positions": jnp.zeros_like(labels)}
    np.testing.assert_array_equal(counted_tokens(packed, learned=False), tokens)
    del batch["positions"], batch["labels"]
    assert counted_tokens(batch, learned=True).all()


def test_gradient_checkpointing_of_a_language_model_does_not_matter():
    ids = np.random.default_rng(0).integers(0, 64, (2, 16)).astype(np.int32)
    model = language_model(num_hidden_layers=1)
    model.gradient_checkpointing = "full"
    config = lorax.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights="eva")
    ours = lorax.initialize_eva(model, config, 2 * [{"input_ids": ids}], rngs=0)
    assert ranks_of(ours) == {"model.layers.0.self_attn.o_proj": 2}
    assert ours.gradient_checkpointing == "full"
