"""Logits equal transformers' for every architecture and rotary scaling, float32 against float32."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from lorax.interop.load import load_model
from tests import tiny

pytestmark = pytest.mark.slow

ROWS, LENGTH = 2, 24

SMALL: dict[str, Any] = tiny.SMALL | dict(rms_norm_eps=1e-5)
LLAMA3: dict[str, Any] = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN: dict[str, Any] = dict(
    rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16
)

CASES = {
    "llama": ("Llama", {}),
    "llama-heads-not-grouped": ("Llama", dict(num_key_value_heads=4)),
    "llama-tied": ("Llama", dict(tie_word_embeddings=True)),
    "llama-attention-bias": ("Llama", dict(attention_bias=True)),
    "llama-mlp-bias": ("Llama", dict(mlp_bias=True)),
    "llama-wide-heads": ("Llama", dict(head_dim=16)),
    "llama-llama3": ("Llama", dict(rope_parameters=LLAMA3)),
    "llama-linear": (
        "Llama",
        dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=3.0)),
    ),
    "llama-dynamic-within": (
        "Llama",
        dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)),
    ),
    "llama-dynamic-beyond": (
        "Llama",
        dict(
            rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0),
            max_position_embeddings=10,
        ),
    ),
    "llama-yarn": ("Llama", dict(rope_parameters=YARN)),
    "llama-yarn-scales": (
        "Llama",
        dict(
            rope_parameters=YARN
            | dict(mscale=0.7, mscale_all_dim=1.2, beta_fast=8, beta_slow=2, truncate=False)
        ),
    ),
    "llama-yarn-attention-factor": (
        "Llama",
        dict(rope_parameters=YARN | dict(attention_factor=1.3)),
    ),
    "mistral": ("Mistral", dict(sliding_window=None)),
    "mistral-window": ("Mistral", dict(sliding_window=7)),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": (
        "Qwen2",
        dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    ),
    "qwen2-layer-types": (
        "Qwen2",
        dict(
            use_sliding_window=True,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    "qwen2-tied": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "qwen3-bias-tied": (
        "Qwen3",
        dict(head_dim=8, attention_bias=True, tie_word_embeddings=True),
    ),
}


def reference_model(family, settings):
    """Returns a torch model whose every weight, norms and biases included, is random."""
    config = getattr(transformers, f"{family}Config")(**SMALL | settings)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model


def relative_error(ours, reference):
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    return np.linalg.norm(ours - reference) / np.linalg.norm(reference)


def tokens(seed=0):
    return np.random.default_rng(seed).integers(0, SMALL["vocab_size"], (ROWS, LENGTH))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case, tmp_path):
    model = reference_model(*CASES[case])
    model.save_pretrained(tmp_path)
    ids = tokens()
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    ours = load_model(tmp_path, dtype=jnp.float32)
    logits = jax.jit(lambda m, x: m(x))(ours, jnp.asarray(ids, jnp.int32))
    assert logits.dtype == jnp.float32
    assert relative_error(logits, expected) <= 1e-5


def test_bfloat16_is_as_close_to_float32_as_transformers_bfloat16(tmp_path):
    model = reference_model("Qwen3", dict(head_dim=16))
    model.save_pretrained(tmp_path)
    ids = tokens()
    with torch.no_grad():
        exact = model(torch.from_numpy(ids)).logits.numpy()
        theirs = model.to(torch.bfloat16)(torch.from_numpy(ids)).logits.float().numpy()
    ours = load_model(tmp_path, dtype=jnp.bfloat16)
    logits = jax.jit(lambda m, x: m(x))(ours, jnp.asarray(ids, jnp.int32))
    assert relative_error(logits, exact) <= 1.5 * relative_error(theirs, exact)
