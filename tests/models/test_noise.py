"""Noise on embeddings: transformers' hook is the oracle."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import PartitionSpec
from transformers.integrations.neftune import neftune_post_forward_hook

from lorax.devices.mesh import make_mesh
from lorax.models.decoder import CausalLM
from lorax.models.families import read_architecture
from lorax.models.noise import EmbeddingNoise
from tests.tiny import LLAMA

ALPHA = 5.0
SHAPE = (4, 50, 40)


def noise_of(key=0, shape=SHAPE, dtype: Any = jnp.float32):
    """What is added to zeros."""
    noise = EmbeddingNoise(ALPHA)
    noise.set_key(jax.random.key(key))
    return noise(jnp.zeros(shape, dtype))


def test_it_is_distributed_as_in_transformers():
    ours = np.sort(np.asarray(noise_of()).ravel())
    module: Any = SimpleNamespace(training=True, neftune_noise_alpha=ALPHA)
    torch.manual_seed(0)
    theirs = np.sort(neftune_post_forward_hook(module, None, torch.zeros(SHAPE)).numpy().ravel())
    bound = ALPHA / np.sqrt(SHAPE[1] * SHAPE[2])
    # Of n draws, the largest is below 1 - 20/n of the bound with a probability of e⁻¹⁰.
    for draws in (ours, theirs):
        assert bound * (1 - 20 / draws.size) < np.abs(draws).max() <= bound * (1 + 1e-6)
    # Kolmogorov and Smirnov's distance of two samples is above 2.5·√(2/n) once in 10⁵ times.
    rank = np.searchsorted(theirs, ours) / ours.size
    distance = np.abs(rank - np.arange(ours.size) / ours.size).max()
    assert distance < 2.5 * np.sqrt(2 / ours.size)


def test_in_bfloat16_its_mean_is_zero_too():
    noise = noise_of(shape=(128, 64, 64), dtype=jnp.bfloat16)
    assert noise.dtype == jnp.bfloat16
    values = np.asarray(noise, np.float64)
    deviation = ALPHA / 64 / np.sqrt(3 * values.size)
    assert abs(values.mean()) < 5 * deviation


def test_every_key_and_every_row_has_its_own():
    first = np.asarray(noise_of())
    np.testing.assert_array_equal(first, noise_of())
    assert not np.isclose(first, noise_of(key=1)).any(axis=(1, 2)).all()
    rows = first.reshape(SHAPE[0], -1)
    assert np.abs(np.corrcoef(rows) - np.eye(SHAPE[0])).max() < 5 / np.sqrt(rows.shape[1])


def test_four_devices_draw_what_one_does():
    mesh = make_mesh(4)
    rows = jax.sharding.NamedSharding(mesh, PartitionSpec("data"))

    def draw(key, x):
        noise = EmbeddingNoise(ALPHA)
        noise.set_key(key)
        return noise(x)

    zeros = jnp.zeros(SHAPE)
    one = jax.jit(draw)(jax.random.key(0), zeros)
    four = jax.jit(draw, out_shardings=rows)(jax.random.key(0), jax.device_put(zeros, rows))
    assert len(four.sharding.device_set) == 4
    np.testing.assert_array_equal(np.asarray(four), np.asarray(one))


@pytest.fixture(scope="module")
def model():
    model = CausalLM(read_architecture(LLAMA, "test"), rngs=nnx.Rngs(0))
    model.train()
    return model


IDS = jnp.arange(1, 13, dtype=jnp.int32).reshape(2, 6)


def test_a_model_adds_it_to_its_embeddings_in_training_alone(model):
    noisy = nnx.clone(model)
    noisy.noise = EmbeddingNoise(ALPHA)
    with pytest.raises(ValueError, match=r"neftune_noise_alpha needs a fresh key every step"):
        noisy(IDS)
    noisy.noise.set_key(jax.random.key(3))
    embedded = model.model.embed_tokens(IDS)
    expected = model.hidden_states(IDS, inputs_embeds=embedded + noise_of(3, embedded.shape))
    found = noisy.hidden_states(IDS)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(noisy.hidden_states(IDS, inputs_embeds=embedded), expected)
    plain = model.hidden_states(IDS)
    assert not np.allclose(found, plain)
    noisy.eval()
    np.testing.assert_array_equal(noisy.hidden_states(IDS), plain)
    cache = noisy.init_cache(2, 8)
    np.testing.assert_allclose(
        noisy.hidden_states(IDS, cache=cache)[0], plain, rtol=1e-4, atol=1e-5
    )
