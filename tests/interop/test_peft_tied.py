"""Adapters of an embedding that is the output head too, against the installed PEFT."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from peft import get_peft_model_state_dict
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lorax
from lorax.adapters.nnx.tree import adapted_layers, split_trainable
from lorax.adapters.targets import TargetError
from lorax.interop.export import export_model
from lorax.interop.load import load_model
from lorax.interop.peft import adapter_tensors, load_adapter, save_adapter
from lorax.interop.peft_config import AdapterError, adapter_notes
from lorax.objectives.linear_loss import linear_cross_entropy
from tests.interop.peft_adapters import (
    TOKENS,
    edit,
    peft_model,
    relative,
    save,
    torch_logits,
    trained,
)

# PEFT's remarks on saving, on merging, and on what this file refuses.
pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = {
    "embedding": ["embed_tokens"],
    "head": ["lm_head"],
    "both": ["q_proj", "embed_tokens", "lm_head"],
    "expression": r".*\.q_proj|.*embed_tokens|lm_head",
}


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("tied") / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(tied):
    return load_model(tied, dtype=jnp.float32)


@pytest.fixture(scope="module")
def untied(tied, tmp_path_factory):
    """The base with a head of its own, made as the errors say."""
    model: Any = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    folder = tmp_path_factory.mktemp("untied") / "model"
    model.save_pretrained(folder)
    return load_model(folder, dtype=jnp.float32)


def made_by_peft(tied, folder, targets, **settings) -> Any:
    settings = {"ensure_weight_tying": True, **settings}
    model = trained(peft_model(tied, target_modules=targets, **settings))
    save(model, folder)
    return model


@pytest.mark.parametrize("name", TARGETS)
def test_an_adapter_that_peft_ties_loads_and_is_written_as_peft_does(tied, ours, tmp_path, name):
    theirs = made_by_peft(tied, tmp_path / "theirs", TARGETS[name], use_rslora=True)
    loaded = load_adapter(ours, tmp_path / "theirs")
    assert "model.embed_tokens" in adapted_layers(loaded)
    assert relative(loaded(jnp.asarray(TOKENS)), torch_logits(theirs)) <= 1e-5
    found = adapter_tensors(loaded)
    expected = get_peft_model_state_dict(theirs, save_embedding_layers=False)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value.numpy())


def test_its_gradient_is_that_of_lookup_and_head_together(tied, ours, tmp_path):
    theirs = made_by_peft(tied, tmp_path / "theirs", ["embed_tokens"])
    tokens = torch.tensor(TOKENS)
    theirs(input_ids=tokens, labels=tokens).loss.backward()
    own = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    head = "base_model.model.lm_head.lora_{}.default.weight"
    embed = "base_model.model.model.embed_tokens.lora_embedding_{}.default"
    graph, trainable, rest = split_trainable(load_adapter(ours, tmp_path / "theirs"))

    def loss_of(trainable):
        model: Any = nnx.merge(graph, trainable, rest)
        hidden = model.hidden_states(jnp.asarray(TOKENS))[:, :-1]
        labels = jnp.asarray(TOKENS[:, 1:])
        return linear_cross_entropy(model.lm_head, hidden, labels) / labels.size

    gradients = nnx.merge(graph, jax.grad(loss_of)(trainable), rest)
    layer = adapted_layers(gradients)["model.embed_tokens"]
    for mine, at_embed, at_head in (("lora_a", "A", "B"), ("lora_b", "B", "A")):
        expected = own[embed.format(at_embed)].T + own[head.format(at_head)]
        assert relative(layer.adapter.params[mine], expected.numpy()) <= 1e-4


def test_merged_it_is_one_table_which_peft_does_not_make(tied, ours, tmp_path):
    theirs = made_by_peft(tied, tmp_path / "theirs", ["embed_tokens"])
    loaded = load_adapter(ours, tmp_path / "theirs")
    verified = export_model(loaded, tmp_path / "merged", "merged", base=tied)
    assert verified.logit_error <= 1e-4
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert relative(torch_logits(again), torch_logits(theirs)) <= 1e-5
    assert relative(torch_logits(theirs.merge_and_unload()), torch_logits(again)) > 0.1


@pytest.mark.parametrize("name", TARGETS)
def test_what_peft_adapts_apart_is_refused_with_a_remedy(tied, ours, untied, tmp_path, name):
    theirs = made_by_peft(tied, tmp_path / "theirs", TARGETS[name], ensure_weight_tying=False)
    with pytest.raises(AdapterError, match="without ensure_weight_tying, so PEFT adapts") as said:
        load_adapter(ours, tmp_path / "theirs")
    assert "a head of its own" in str(said.value)
    remedy = load_adapter(untied, tmp_path / "theirs")
    assert relative(remedy(jnp.asarray(TOKENS)), torch_logits(theirs)) <= 1e-5


def test_magnitudes_of_a_head_of_its_own_are_refused_with_a_remedy(tied, ours, untied, tmp_path):
    theirs = made_by_peft(tied, tmp_path / "theirs", ["embed_tokens"], use_dora=True)
    with pytest.raises(AdapterError, match=r"use_dora of a tied .*add lm_head to target_modules"):
        load_adapter(ours, tmp_path / "theirs")
    edit(tmp_path / "theirs", target_modules=["embed_tokens", "lm_head"])
    remedy = load_adapter(untied, tmp_path / "theirs")
    assert relative(remedy(jnp.asarray(TOKENS)), torch_logits(theirs)) <= 1e-5


def test_scales_that_differ_are_refused_with_a_remedy(tied, ours, untied, tmp_path):
    theirs = made_by_peft(tied, tmp_path / "a", ["embed_tokens"], alpha_pattern={"lm_head": 3})
    with pytest.raises(AdapterError, match=r"lm_head the scale 0.75 and model.embed_tokens, .* 2"):
        load_adapter(ours, tmp_path / "a")
    edit(tmp_path / "a", target_modules=["embed_tokens", "lm_head"])
    remedy = load_adapter(untied, tmp_path / "a")
    assert relative(remedy(jnp.asarray(TOKENS)), torch_logits(theirs)) <= 1e-5


def test_patterns_that_give_both_one_scale_load(tied, ours, tmp_path):
    patterns = {"embed_tokens": 6, "lm_head": 6}
    theirs = made_by_peft(tied, tmp_path / "a", ["embed_tokens"], alpha_pattern=patterns)
    loaded = load_adapter(ours, tmp_path / "a")
    assert relative(loaded(jnp.asarray(TOKENS)), torch_logits(theirs)) <= 1e-5


def test_a_pair_that_was_trained_apart_is_refused(tied, ours, tmp_path):
    made_by_peft(tied, tmp_path / "a", ["embed_tokens"])
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.lm_head.lora_A.weight"
    save_file(tensors | {key: tensors[key] + 1}, path)
    with pytest.raises(AdapterError, match=r"lm_head.lora_A.weight must be the transpose of"):
        load_adapter(ours, tmp_path / "a")


def test_dora_of_a_tied_embedding_is_exported_as_merged_alone(tied, ours, tmp_path):
    settings: dict[str, Any] = {"r": 4, "target_modules": ["embed_tokens"], "use_dora": True}
    adapted = lorax.apply_lora(ours, lorax.LoraConfig(**settings), rngs=0)
    adapter = adapted_layers(adapted)["model.embed_tokens"].adapter
    for name, value in adapter.params.items():
        moved = value + jnp.linspace(0, 0.3, value.size).reshape(value.shape)
        adapter.variable(name).set_value(moved)
    with pytest.raises(
        ValueError, match=r"model.embed_tokens is lm_head too .*, or merge the adapter"
    ):
        save_adapter(adapted, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export_model(adapted, tmp_path / "merged", "merged", base=tied).logit_error <= 1e-4


def test_the_head_is_no_target_and_the_error_names_the_embedding(ours):
    config = lorax.LoraConfig(target_modules=["lm_head"])
    with pytest.raises(TargetError, match=r"lm_head is tied to model.embed_tokens, whose adapter"):
        lorax.apply_lora(ours, config, rngs=0)


def test_how_further_training_differs_is_told(tied, tmp_path):
    made_by_peft(tied, tmp_path / "a", ["embed_tokens"])
    (told,) = adapter_notes(tmp_path / "a")
    assert "as those of the lookup, and as those of the head" in told
    assert not adapter_notes(tmp_path / "a", trains=False)
    assert not adapter_notes(edit(tmp_path / "a", target_modules=["q_proj"]))
    (told,) = adapter_notes(edit(tmp_path / "a", use_dora=True, lora_dropout=0.1))
    assert "lora_dropout also drops inputs of the frozen weight" in told
