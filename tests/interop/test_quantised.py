"""Checkpoints that transformers and bitsandbytes quantised: read as they are, or refused."""

import json
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from lorax.adapters.nnx.tree import split_trainable
from lorax.interop.load import load_model
from lorax.interop.peft import adapter_tensors, load_adapter
from lorax.layers.linear import Linear
from lorax.models.families import read_architecture
from lorax.models.quantization import Quantization
from lorax.training.step import make_train_step
from lorax.weights.nf4 import NF4, NF4_DOUBLE
from lorax_kernels.weights.nf4 import Nf4
from tests.interop.peft_adapters import relative
from tests.tiny import LLAMA, SMALL, edit_json

SKIPPED = ["lm_head", "model.layers.1.mlp", "o_proj"]
UP = "model.layers.0.mlp.up_proj.weight"
CASES = {
    "single": {},
    "double": {"bnb_4bit_use_double_quant": True},
    "skipped": {"llm_int8_skip_modules": SKIPPED},
    "stored as bfloat16": {"bnb_4bit_quant_storage": torch.bfloat16},
}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    torch.manual_seed(0)
    # Widths of whole blocks and of others: 48 = 3/4 of a block.
    sizes = SMALL | dict(hidden_size=64, num_attention_heads=4, vocab_size=96)
    LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantised(original, tmp_path_factory):
    """Returns the folder of a case, which transformers writes when it is first asked for."""
    made = {}

    def folder(case):
        if case not in made:
            settings = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=torch.float32,
                **CASES[case],
            )
            options = {"device_map": "cpu", "dtype": torch.float32}
            model = AutoModelForCausalLM.from_pretrained(
                original, quantization_config=settings, **options
            )
            made[case] = tmp_path_factory.mktemp("quantised")
            model.save_pretrained(made[case])
        return made[case]

    return folder


def logits(model, ids):
    found = model(jnp.asarray(ids))
    return np.asarray(found[0] if isinstance(found, tuple) else found)


@pytest.mark.parametrize("case", CASES)
def test_a_quantised_folder_gives_the_logits_of_transformers_and_bitsandbytes(quantised, case):
    theirs = AutoModelForCausalLM.from_pretrained(
        quantised(case), device_map="cpu", dtype=torch.float32
    )
    ids = np.random.default_rng(0).integers(0, 96, (2, 24))
    with torch.no_grad():
        want = theirs(torch.tensor(ids)).logits.numpy()
    ours = load_model(quantised(case), dtype=jnp.float32)
    np.testing.assert_allclose(logits(ours, ids), want, rtol=0, atol=1e-5)
    stored = {
        ".".join(map(str, path)): isinstance(layer.kernel.get_value(), Nf4)
        for path, layer in nnx.iter_modules(ours)
        if isinstance(layer, Linear)
    }
    in_4_bits = {name for name, layer in theirs.named_modules() if "4bit" in type(layer).__name__}
    assert in_4_bits == {name for name, is_nf4 in stored.items() if is_nf4}
    assert len(in_4_bits) == (9 if case == "skipped" else 14)


def test_the_rule_of_skipped_modules_is_that_of_transformers(quantised):
    raw = json.loads((quantised("skipped") / "config.json").read_text())
    quantization = read_architecture(raw, "config.json").quantization
    assert quantization == Quantization(double=False, skipped=tuple(SKIPPED))
    with safe_open(quantised("skipped") / "model.safetensors", "pt") as file:
        weights = [n for n in file.keys() if n.endswith("proj.weight")]
        in_4_bits = {n for n in weights if file.get_slice(n).get_dtype() == "U8"}
    assert in_4_bits == {n for n in weights if quantization.quantises(n.removesuffix(".weight"))}


@pytest.mark.parametrize("double", [False, True])
def test_a_16_bit_checkpoint_is_quantised_while_it_is_read(original, double):
    format = NF4_DOUBLE if double else NF4
    plain = load_model(original, dtype=jnp.float32)
    ours = load_model(original, dtype=jnp.float32, format=format)
    for path, layer in nnx.iter_modules(plain):
        if not isinstance(layer, Linear):
            continue
        found: Any = ours
        for part in path:
            found = found[part] if isinstance(part, int) else getattr(found, part)
        got = found.kernel.get_value()
        kernel = layer.kernel.get_value()
        if path[0] == "lm_head":
            np.testing.assert_array_equal(got, kernel)
        else:
            np.testing.assert_array_equal(format.dense(got), format.dense(format.store(kernel)))


# What is refused


def changed(folder, tmp_path, tensors=None, **fields):
    """Returns a copy of a folder with other tensors and fields of its quantization_config."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    if tensors is not None:
        values = load_file(copy / "model.safetensors")
        tensors(values)
        save_file(values, copy / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((copy / "config.json").read_text())
    own = {k: v for k, v in (raw["quantization_config"] | fields).items() if v is not ...}
    edit_json(copy / "config.json", quantization_config=own)
    return copy


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            dict(quant_method="gptq"),
            r"quantization_config\.quant_method must be bitsandbytes",
        ),
        (dict(load_in_4bit=False, load_in_8bit=True), r"load_in_4bit must be true"),
        (dict(bnb_4bit_quant_type="fp4"), r"bnb_4bit_quant_type must be nf4 .*model\.quantization"),
        (dict(bnb_4bit_quant_type=...), r"bnb_4bit_quant_type must be nf4"),
        (dict(bnb_4bit_use_double_quant="yes"), r"bnb_4bit_use_double_quant must be true or false"),
        (dict(llm_int8_skip_modules="lm_head"), r"llm_int8_skip_modules must be a list"),
        (dict(llm_int8_skip_modules=["("]), r"llm_int8_skip_modules must be a list"),
        (dict(bnb_4bit_blocksize=128), r"bnb_4bit_blocksize"),
        (dict(bnb_4bit_use_double_quant=True), r"use_double_quant is true, but .* holds .* as nf4"),
    ],
)
def test_a_quantisation_that_is_not_computed_is_refused_by_its_field(
    quantised, tmp_path, fields, message
):
    with pytest.raises(ValueError, match=message):
        load_model(changed(quantised("single"), tmp_path, **fields))


def scaled(values):
    values[UP + ".quant_map"] = values[UP + ".quant_map"] * 1.01


def shortened(values):
    values[UP + ".absmax"] = values[UP + ".absmax"][1:].clone()


def without_scales(values):
    del values[UP + ".absmax"]


def without_state(values):
    del values[UP + ".quant_state.bitsandbytes__nf4"]


def in_fp4(values):
    state = values.pop(UP + ".quant_state.bitsandbytes__nf4")
    values[UP + ".quant_state.bitsandbytes__fp4"] = state


def with_nan(values):
    values[UP + ".absmax"][3] = float("nan")


def with_state(**fields):
    def change(values):
        name = UP + ".quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(values[name].tolist())) | fields
        values[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (scaled, r"quant_map holds other levels"),
        (shortened, r"absmax is F32 \[47\]; a matrix of \[48, 64\] needs 48 of F32"),
        (without_scales, r"lacks .*up_proj\.weight\.absmax"),
        (without_state, r"up_proj\.weight has dtype U8; .*dequantise it first"),
        (in_fp4, r"describes fp4; .* nf4"),
        (with_nan, r"up_proj\.weight holds values that are not finite"),
        (with_state(blocksize=128), r"blocksize must be 64"),
        (with_state(shape=[48, 32]), r"up_proj\.weight is U8 .*; a matrix of \[48, 32\]"),
        (with_state(shape=[96, 32]), r"up_proj\.weight has shape \(96, 32\)"),
        (with_state(dtype="int8"), r"dtype must be one of"),
        (with_state(extra=1), r"extra"),
    ],
)
def test_a_damaged_matrix_is_refused_by_its_tensor(quantised, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_model(changed(quantised("single"), tmp_path, change))


def test_a_description_and_the_tensors_must_agree(original, quantised, tmp_path):
    copy = changed(quantised("single"), tmp_path)
    edit_json(copy / "config.json", quantization_config=None)
    with pytest.raises(ValueError, match=r"has no quantization_config, but .* in NF4"):
        load_model(copy)
    raw = json.loads((quantised("single") / "config.json").read_text())
    plain = shutil.copytree(original, tmp_path / "plain")
    edit_json(plain / "config.json", quantization_config=raw["quantization_config"])
    with pytest.raises(ValueError, match=r"no tensor of the folder is quantised: remove the field"):
        load_model(plain)


def test_a_quantised_folder_is_not_quantised_once_more(quantised):
    with pytest.raises(ValueError, match=r"quantised as nf4, and nf4_double is asked for"):
        load_model(quantised("single"), format=NF4_DOUBLE)
    load_model(quantised("single"), format=NF4)


def test_the_config_of_a_quantised_model_says_nothing_of_it_when_it_is_written():
    raw = LLAMA | {
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
        }
    }
    config = read_architecture(raw, "config.json")
    assert config.quantization == Quantization(False, None)
    assert not [name for name in config.to_hf() if re.search("quant", name)]
    assert config == read_architecture(config.to_hf(), "config.json")


# Training on it


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_training_on_it_is_that_of_peft_and_bitsandbytes(quantised, tmp_path):
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        quantised("double"), device_map="cpu", dtype=torch.float32
    )
    targets = ["q_proj", "v_proj", "down_proj"]
    theirs = get_peft_model(theirs, PeftLoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:  # where both matrices have gradients
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_adapter(load_model(quantised("double"), dtype=jnp.float32), tmp_path / "adapter")
    graph, trainable, rest = split_trainable(ours)
    ids = np.random.default_rng(1).integers(0, 96, (4, 33))
    optimizer = optax.adam(1e-2)
    torch_optimizer = torch.optim.Adam([p for p in theirs.parameters() if p.requires_grad], 1e-2)

    @jax.jit
    def step(trainable, state):
        def loss_of(trainable):
            scores = nnx.merge(graph, trainable, rest)(jnp.asarray(ids[:, :-1]))
            return optax.softmax_cross_entropy_with_integer_labels(scores, ids[:, 1:]).mean()

        loss, gradients = jax.value_and_grad(loss_of)(trainable)
        with jax.numpy_dtype_promotion("standard"):  # as optax needs it
            updates, state = optimizer.update(gradients, state, trainable)
        return loss, gradients, optax.apply_updates(trainable, updates), state

    state = optimizer.init(trainable)
    losses = []
    for index in range(50):
        loss, gradients, trainable, state = step(trainable, state)
        torch_optimizer.zero_grad()
        scores = theirs(torch.tensor(ids[:, :-1])).logits.reshape(-1, 96)
        expected = torch.nn.functional.cross_entropy(scores, torch.tensor(ids[:, 1:]).reshape(-1))
        expected.backward()
        losses.append((float(loss), expected.item()))
        if index == 0:
            found = adapter_tensors(nnx.merge(graph, gradients, rest))
            named = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
            wanted = get_peft_model_state_dict(theirs, state_dict=named)
            assert found.keys() == wanted.keys() and len(found) == 12
            for key, value in wanted.items():
                assert relative(found[key], value.numpy()) <= 1e-4, key
        torch_optimizer.step()
    assert max(abs(a - b) for a, b in losses) <= 2e-3
    assert losses[-1][0] < 0.9 * losses[0][0]


def test_a_quantised_model_is_not_trained_whole(quantised):
    model = load_model(quantised("single"), dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"quantised: apply_lora it first, or load the 16-bit"):
        make_train_step(model, optax.adamw(1e-3))
