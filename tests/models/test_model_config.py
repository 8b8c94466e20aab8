"""config.json: every field is honoured or refused, and what is written reads back everywhere."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lorax.layers.rope import RopeConfig, inverse_frequencies
from lorax.models.architecture import stored_dtype
from lorax.models.families import read_architecture
from lorax.system.json_fields import JsonFields
from tests import tiny
from tests.models.contract import LLAMA3, ROPES, YARN

SMALL: dict[str, Any] = tiny.SMALL | dict(num_hidden_layers=3)
WHERE = "model/config.json"

FAMILIES = {
    "llama": dict(attention_bias=True, mlp_bias=True, head_dim=16, tie_word_embeddings=True),
    "mistral": dict(sliding_window=7),
    "qwen2": dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": dict(
        head_dim=16,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}


def read(**settings):
    return read_architecture(dict(SMALL, model_type="llama") | settings, WHERE)


def theirs(model_type, **settings):
    return transformers.AutoConfig.for_model(model_type, **SMALL | settings)


@pytest.mark.parametrize("rope", ROPES)
def test_both_spellings_of_the_rotary_embedding_are_the_same(rope):
    new = read(rope_parameters=ROPES[rope])
    inner = {k: v for k, v in ROPES[rope].items() if k != "rope_theta"}
    theta = ROPES[rope]["rope_theta"]
    assert read(rope_theta=theta, rope_scaling=inner) == new
    old = {("type" if k == "rope_type" else k): v for k, v in inner.items()}
    assert read(rope_theta=theta, rope_scaling=old) == new
    assert read(rope_theta=theta, rope_scaling=old | inner) == new
    assert read(rope_theta=theta, rope_scaling=inner, rope_parameters=ROPES[rope]) == new


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("rope", [r for r in ROPES if r != "default"])
def test_inverse_frequencies_equal_those_of_transformers(rope, head_dim):
    config = theirs("llama", head_dim=head_dim, rope_parameters=dict(ROPES[rope]))
    expected, factor = ROPE_INIT_FUNCTIONS[ROPES[rope]["rope_type"]](config, "cpu")
    fields = JsonFields({"rope_parameters": ROPES[rope]}, WHERE)
    ours, ours_factor = inverse_frequencies(RopeConfig.from_hf(fields), head_dim, 64)
    assert ours.dtype == np.float32 and ours_factor == pytest.approx(factor, rel=1e-12)
    # torch's own power is off by a unit in the last place now and then.
    np.testing.assert_array_max_ulp(ours, expected.numpy(), maxulp=2)


def test_default_frequencies_equal_those_of_transformers():
    rope: dict[str, Any] = dict(rope_theta=5e5)
    config = transformers.LlamaConfig(**SMALL, head_dim=64, rope_parameters=rope)
    embedding = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    ours, factor = inverse_frequencies(RopeConfig(rope_theta=5e5), 64, 64)
    assert factor == embedding.attention_scaling
    assert isinstance(embedding.inv_freq, torch.Tensor)
    np.testing.assert_array_max_ulp(ours, embedding.inv_freq.numpy(), maxulp=1)


def test_windows_begin_at_max_window_layers_where_no_types_are_given():
    settings = dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)
    config = read(model_type="qwen2", **settings)
    assert list(config.layer_types) == theirs("qwen2", **settings).layer_types
    assert [config.window(i) for i in range(3)] == [None, 5, 5]


def test_a_window_that_is_switched_off_is_off():
    config = read(
        model_type="qwen2", use_sliding_window=False, sliding_window=5, max_window_layers=0
    )
    assert [config.window(i) for i in range(3)] == [None] * 3
    assert read(model_type="mistral", sliding_window=None).window(0) is None


REFUSED = {
    "unknown field": (dict(sliding_windows=4), "sliding_windows=4 is not a field .* here"),
    "nearest name": (dict(rms_norm_epsilon=1e-5), "nearest known field is rms_norm_eps"),
    "model type": (dict(model_type="gpt2"), "model_type must be one of llama, mistral"),
    "missing size": (dict(vocab_size=None), "vocab_size is missing"),
    "no tokens": (dict(vocab_size=0), "vocab_size must be an integer of at least 1, got 0"),
    "no heads": (dict(num_attention_heads=0), "num_attention_heads must be .* at least 1, got 0"),
    "text for a number": (dict(hidden_size="32"), "hidden_size must be an integer .* got '32'"),
    "true for a number": (dict(num_hidden_layers=True), "num_hidden_layers must be an integer"),
    "number for true": (dict(tie_word_embeddings=1), "tie_word_embeddings must be true or false"),
    "groups": (dict(num_key_value_heads=3), "num_key_value_heads must divide .*=4, got 3"),
    "width": (dict(hidden_size=30), "hidden_size must be a multiple of num_attention_heads=4"),
    "odd head": (dict(head_dim=7), "head_dim must be even to be rotated, got 7"),
    "eps": (dict(rms_norm_eps=0), "rms_norm_eps must be a number above 0, got 0"),
    "infinite eps": (dict(rms_norm_eps=float("inf")), "rms_norm_eps must be a number above 0"),
    "activation": (dict(hidden_act="gelu"), "hidden_act must be 'silu' or 'swish' .* got 'gelu'"),
    "dropout": (dict(attention_dropout=0.1), "attention_dropout must be 0 .* got 0.1"),
    "tensor parallel": (dict(pretraining_tp=2), "pretraining_tp must be 1"),
    "quantised": (
        dict(quantization_config={"bits": 4}),
        "quantization_config.quant_method must be bitsandbytes",
    ),
    "partial rotation": (dict(partial_rotary_factor=0.5), "partial_rotary_factor must be 1"),
    "custom code": (dict(auto_map={"AutoModel": "x.Y"}), "auto_map must be absent .*runs no code"),
    "classifier": (
        dict(architectures=["LlamaForSequenceClassification"]),
        "architectures must be a causal language model",
    ),
    "window of llama": (dict(sliding_window=4), "sliding_window=4 is not a field"),
    "bias of mistral": (
        dict(model_type="mistral", attention_bias=True),
        "attention_bias must be absent .*transformers ignores it for this model_type",
    ),
    "layers of mistral": (
        dict(model_type="mistral", layer_types=["full_attention"] * 3),
        "layer_types=.* is not a field",
    ),
    "too few layer types": (
        dict(model_type="qwen2", layer_types=["full_attention"]),
        "layer_types must be 3 times",
    ),
    "unknown layer type": (
        dict(model_type="qwen2", layer_types=["full_attention", "chunked_attention", "x"]),
        "layer_types must be 3 times",
    ),
    "sliding without window": (
        dict(model_type="qwen2", layer_types=["sliding_attention"] * 3),
        "needs use_sliding_window: true and a sliding_window",
    ),
    "window of 0": (dict(model_type="mistral", sliding_window=0), "sliding_window must be"),
    "rope type": (
        dict(rope_scaling=dict(rope_type="longrope", factor=2.0)),
        "rope_scaling.rope_type must be one of default, linear, .* got 'longrope'",
    ),
    "old rope type": (dict(rope_scaling=dict(type="su")), "rope_scaling.type must be one of"),
    "rope types disagree": (
        dict(rope_scaling=dict(type="linear", rope_type="dynamic", factor=2.0)),
        "rope_type must equal rope_scaling.type='linear'",
    ),
    "no factor": (dict(rope_scaling=dict(type="linear")), "rope_scaling.factor is missing"),
    "shrinking": (
        dict(rope_scaling=dict(type="linear", factor=0.5)),
        "rope_scaling.factor must be a number of at least 1",
    ),
    "field of another rope": (
        dict(rope_scaling=dict(type="linear", factor=2.0, low_freq_factor=1.0)),
        "rope_scaling.low_freq_factor=1.0 is not a field",
    ),
    "rope per layer type": (
        dict(rope_parameters=dict(full_attention=dict(rope_type="default"))),
        "rope_parameters.full_attention=.* is not a field",
    ),
    "llama3 factors": (
        dict(rope_parameters=LLAMA3 | dict(low_freq_factor=4.0)),
        "high_freq_factor must exceed rope_parameters.low_freq_factor",
    ),
    "yarn betas": (
        dict(rope_parameters=YARN | dict(beta_fast=1.0, beta_slow=2.0)),
        "beta_fast must be at least rope_parameters.beta_slow",
    ),
    "two thetas": (
        dict(rope_theta=1e4, rope_parameters=dict(rope_theta=5e5)),
        "rope_parameters.rope_theta must equal the rope_theta=10000.0 outside, got 500000.0",
    ),
    "two ropes": (
        dict(rope_parameters=YARN, rope_scaling=dict(type="linear", factor=2.0)),
        "rope_parameters must agree with rope_scaling",
    ),
    "rope is no object": (dict(rope_scaling="linear"), "rope_scaling must be an object"),
    "negative theta": (dict(rope_theta=-1.0), "rope_theta must be a number above 0"),
    "no model type": (dict(model_type=None), "model_type is missing; it must be one of llama"),
    "model type as list": (dict(model_type=["llama"]), "model_type must be one of llama"),
    "class of another model": (
        dict(architectures=["Qwen2ForCausalLM"]),
        "architectures must be LlamaForCausalLM, by its model_type",
    ),
    "what classes there are": (
        dict(architectures=["LlamaModel"]),
        "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, got",
    ),
    "several unknown fields": (
        dict(sliding_windows=4, rms_norm_epsilon=1e-5),
        "sliding_windows=4 is not a field .*rms_norm_epsilon=1e-05 is not .*They may change",
    ),
    "layer types of another type": (
        dict(model_type="qwen2", layer_types=[["full_attention"]] * 3),
        "layer_types must be 3 times",
    ),
    "rope type of another type": (
        dict(rope_scaling=dict(rope_type=["linear"], factor=2.0)),
        "rope_scaling.rope_type must be one of default",
    ),
    "stop token beyond 32 bits": (dict(eos_token_id=2**31), "eos_token_id must be below 2³¹"),
    "stop token as object": (dict(eos_token_id={"a": 1}), "eos_token_id must be a token id"),
    "number beyond floats": (
        dict(rms_norm_eps=10**400),
        "rms_norm_eps must be a number above 0, got a number of about 400 digits",
    ),
    "text of 20,000 characters": (
        dict(hidden_act="x" * 20_000),
        r"hidden_act must be .*got 'x{100}'… \(19,900 characters more\)",
    ),
    "windows of a llama": (dict(use_sliding_window=True), "use_sliding_window must be False"),
    "mistral's window switched off": (
        dict(model_type="mistral", use_sliding_window=False),
        "use_sliding_window must be True .*got False",
    ),
    "query norms of a llama": (dict(use_qk_norm=True), "use_qk_norm must be False"),
    "no query norms of a qwen3": (
        dict(model_type="qwen3", qk_norm=False),
        "qk_norm must be True .*got False",
    ),
    "stop token": (dict(eos_token_id="</s>"), "eos_token_id must be a token id or a list"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_lorax_does_not_compute_is_refused(case):
    settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"^{WHERE}: .*{message}"):
        read(**settings)


def test_a_field_that_is_null_counts_as_absent():
    config = read(rope_scaling=None, quantization_config=None, head_dim=None, pretraining_tp=None)
    assert config == read()


TOLD = {
    "a token's id": dict(unk_token_id=0),
    "ids of tokens": dict(image_token_ids=[3, 4]),
    "text of a token": dict(unk_token="<unk>"),
    "a version": dict(internal_version="7b-v2"),
    "a date": dict(release_date="2024-01-02"),
    "a licence": dict(license="apache-2.0"),
    "tags": dict(tags=["chat", "en"]),
    "prose": dict(remark="trained on a cluster of eight"),
    "a switch that is off": dict(sequence_parallel_enabled=False),
    "another": dict(use_moe=False),
    "a cache that is off": dict(kv_cache_quantization=False),
    "an output that is off": dict(output_router_logits=False),
    "an empty list": dict(no_split_modules=[]),
    "no dropout": dict(ffn_dropout=0.0),
    "null": dict(vision_config=None),
}


@pytest.mark.parametrize("case", TOLD)
def test_what_cannot_change_the_result_is_told_and_not_refused(case):
    (name,) = TOLD[case]
    config = read(**TOLD[case])
    assert config == read() and repr(config) == repr(read())
    (note,) = config.notes
    assert note.startswith(f"{WHERE}: {name}=") and "nothing that it computes depends on it" in note
    assert name not in config.to_hf()


def test_all_that_is_told_of_a_file_is_one_line():
    config = read(unk_token_id=0, internal_version="7", sequence_parallel_enabled=False)
    (note,) = config.notes
    assert "unk_token_id=0 (a token id), internal_version='7'" in note
    assert "sequence_parallel_enabled=False (switched off)" in note
    assert not read().notes


MIGHT = {
    "rope switched off": dict(use_rope=False),
    "the causal mask switched off": dict(is_causal=False),
    "norms switched off": dict(use_rms_norm=False),
    "no layer is rotated": dict(rope_layers=[]),
    "the gate switched off": dict(gated_mlp=False),
    "the place of norms": dict(prenorm=False),
    "another mask": dict(bidirectional=False),
    "biases switched off": dict(use_bias=False),
    "biases of what lorax has not": dict(router_bias=False),
    "a switch without a meaning": dict(foo=False),
    "a switch that is on": dict(use_moe=True),
    "a kind of norm": dict(norm_type="layernorm"),
    "a kind of position": dict(position_embedding_type="alibi"),
    "another activation": dict(activation_function="gelu"),
    "text that may choose": dict(mixer="mamba"),
    "a name that may choose": dict(attention_version="linear"),
    "a word without a meaning": dict(foo="bar"),
    "a number": dict(logit_soft_cap=30.0),
    "experts": dict(num_experts=8),
    "a dropout": dict(ffn_dropout=0.1),
    "an object": dict(vision_config={"hidden_size": 8}),
    "true for a token's id": dict(image_token_id=True),
    "an unknown field of the rotary embedding": dict(rope_parameters=dict(rope_mode=False)),
}


@pytest.mark.parametrize("case", MIGHT)
def test_what_might_change_the_result_is_refused(case):
    with pytest.raises(ValueError, match=rf"^{WHERE}: .*is not a field that lorax knows here"):
        read(**MIGHT[case])


def test_what_says_what_is_computed_anyway_is_accepted():
    for same in (
        dict(use_sliding_window=False, sliding_window=4096, max_window_layers=21),
        dict(layer_types=["full_attention"] * 3),
        dict(use_qk_norm=False, parallel_attn=False, use_parallel_residual=False),
        dict(embedding_multiplier=1.0, logits_scaling=1),
        dict(architectures=["LLaMAForCausalLM"]),
    ):
        assert read(**same) == read() and not read(**same).notes
    for model_type, same in (
        ("mistral", dict(attention_bias=False, mlp_bias=False, use_sliding_window=True)),
        ("mistral", dict(layer_types=["sliding_attention"] * 3)),
        ("qwen2", dict(attention_bias=False)),
        ("qwen3", dict(qk_norm=True)),
    ):
        assert read(model_type=model_type, **same) == read(model_type=model_type)


def test_a_class_that_is_not_known_is_told():
    config = read(architectures=["OtherForCausalLM"])
    assert "architectures='OtherForCausalLM' is not known" in config.notes[0]
    assert "computed as LlamaForCausalLM" in config.notes[0]


def test_nothing_that_transformers_can_write_is_refused_or_told():
    generation = transformers.GenerationConfig()
    written = {**transformers.PreTrainedConfig().to_dict(), **generation.to_dict()}
    for model_type in FAMILIES:
        config = theirs(model_type, **FAMILIES[model_type]).to_dict()
        assert not read_architecture(written | config, WHERE).notes


def test_what_transformers_keeps_of_a_gguf_is_told():
    config = theirs("llama", unk_token_id=0, internal_version="x").to_dict()
    assert "unk_token_id=0" in read_architecture(config, WHERE).notes[0]


DTYPES = {
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float32": "float32",
    "half": "float16",
    "float": "float32",
    "torch.bfloat16": "bfloat16",
    "auto": None,
    None: None,
}


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("given", DTYPES)
def test_a_dtype_is_read_as_in_transformers(name, given):
    assert stored_dtype({name: given}, WHERE) == DTYPES[given]
    read(**{name: given})
    if given not in ("auto", "torch.bfloat16"):
        config = theirs("llama", **{name: given}).to_dict()
        assert config["dtype"] == DTYPES[given]


def test_the_newer_name_of_the_dtype_counts():
    both = dict(dtype="float16", torch_dtype="float32")
    assert stored_dtype(both, WHERE) == theirs("llama", **both).to_dict()["dtype"] == "float16"
    assert stored_dtype(dict(dtype="auto", torch_dtype="float32"), WHERE) == "float32"
    assert stored_dtype({}, WHERE) is None


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    "value", ["float23", "fp32", "int8", "float8_e4m3fn", "", 16, 1.5, True, [], ["float32"], {}]
)
def test_a_dtype_that_is_none_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"{WHERE}: {name} must be bfloat16, float16 or float32"):
        read(**{name: value})
