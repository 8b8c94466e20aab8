"""Dropout's masks, and kernels under a mesh."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax.devices.mesh import DATA_AXIS, make_mesh
from lorax_kernels import (
    lora_linear,
)
from lorax_kernels.device import interpreted
from lorax_kernels.lora_linear import fused
from lorax_kernels.lora_linear.dropout import keep_mask, keep_probability, random_bits, seed_words
from lorax_kernels.lora_linear.plan import Dropout
from tests.kernels.interpreter import interpret
from tests.kernels.layers import RATE, draw, draw_members

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_kernel_at_a_time")]


def draw_mask(key, rate, m=1024, k=1024, row0=0):
    seed = seed_words(key)
    row = jax.lax.broadcasted_iota(jnp.uint32, (m, k), 0)
    column = jax.lax.broadcasted_iota(jnp.uint32, (m, k), 1)
    return np.asarray(keep_mask(seed[0], seed[1], jnp.uint32(row0), row, column, rate))


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("key", [0, 1])
def test_a_mask_keeps_the_right_share_and_is_uncorrelated(rate, key):
    mask, keep = draw_mask(jax.random.key(key), rate), keep_probability(rate)
    assert abs(keep - (1.0 - rate)) <= 2.0**-17
    sigma = (keep * (1.0 - keep) / mask.size) ** 0.5
    assert abs(mask.mean() - keep) < 5 * sigma
    noise = mask.astype(np.float64) - keep
    variance = keep * (1.0 - keep)
    shifts = [(1, 0), (0, 1), (1, 1), (2, 0), (8, 0), (16, 0), (0, 8), (0, 64), (64, 0), (128, 256)]
    for i, j in shifts:
        pairs = noise[i:, j:] * noise[: noise.shape[0] - i, : noise.shape[1] - j]
        assert abs(pairs.mean()) / variance < 5 / pairs.size**0.5, (i, j)
    for axis in (0, 1):  # no row and no column is unlike the others
        means = mask.mean(axis) - keep
        assert np.abs(means).max() < 6 * (variance / mask.shape[axis]) ** 0.5


@pytest.mark.parametrize("kind", ["split", "numbered"])
def test_two_keys_give_independent_masks(kind):
    keep = keep_probability(0.3)
    keys = jax.random.split(jax.random.key(0), 4)
    if kind == "numbered":
        keys = [jax.random.key(i) for i in range(4)]
    masks = [draw_mask(key, 0.3) for key in keys]
    expected = keep**2 + (1.0 - keep) ** 2
    for one, other in itertools.combinations(masks, 2):
        sigma = (expected * (1.0 - expected) / one.size) ** 0.5
        assert abs((one == other).mean() - expected) < 5 * sigma


def test_a_mask_of_later_rows_is_a_part_of_the_whole():
    key = jax.random.key(5)
    whole = draw_mask(key, 0.3, 256, 64)
    for row0 in (16, 48, 128):
        np.testing.assert_array_equal(draw_mask(key, 0.3, 64, 64, row0), whole[row0 : row0 + 64])


def test_random_bits_fill_every_byte_evenly():
    seed = seed_words(jax.random.key(11))
    row = jax.lax.broadcasted_iota(jnp.uint32, (512, 1024), 0)
    column = jax.lax.broadcasted_iota(jnp.uint32, (512, 1024), 1)
    draws = np.asarray(random_bits(seed[0], seed[1], row, column)).view(np.uint8).reshape(-1, 4)
    for byte in range(4):
        counts = np.bincount(draws[:, byte], minlength=256)
        expected = len(draws) / 256
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi_square - 255) < 5 * (2 * 255) ** 0.5, byte


def test_kernels_number_rows_from_the_shard_s_first():
    x, a = draw(0, 64, 128), draw(1, 16, 128, scale=0.1)
    words = seed_words(jax.random.key(7))
    seed = lambda row: jnp.concatenate([words, jnp.array([row], jnp.uint32)])
    with interpret(3):
        whole = fused.down_project(x, a, Dropout(seed(0), RATE))
        later = fused.down_project(x[32:], a, Dropout(seed(32), RATE))
    np.testing.assert_array_equal(np.asarray(whole)[32:], np.asarray(later))


def trace_sharded(shape=(8, 64), k=256, n=384, r=16, adds=False, **options):
    """Traces values and gradients on a mesh of four, and lowers them for a GPU."""
    (member,) = draw_members(k, [(n, r)])
    options |= {"scale": 2.0, "kernels": "pallas", "row_axes": (DATA_AXIS,)}

    def loss(x, a, b, residual):
        y = lora_linear(x, member["w"], a, b, residual=residual, **options)
        return y.astype(jnp.float32).sum()

    mesh, residual = make_mesh(4), draw(1, *shape, n) if adds else None
    with jax.set_mesh(mesh), interpreted(132):
        gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3) if adds else (0, 1, 2)))
        return gradients.trace(draw(0, *shape, k), member["a"], member["b"], residual)


@pytest.mark.parametrize("drops, adds", [(False, False), (True, False), (False, True)])
def test_under_a_mesh_every_kernel_sees_its_shard_of_the_rows_and_nothing_is_gathered(drops, adds):
    options = {"dropout_rate": RATE, "dropout_key": jax.random.key(0)} if drops else {}
    traced = trace_sharded(adds=adds, **options)
    reduced = [line for line in str(traced.jaxpr).splitlines() if " psum[axes=('data',)" in line]
    assert sorted(line.split("=")[0].split(":")[1].strip() for line in reduced) == [
        "f32[16,384]",  # of b
        "f32[256,16]",  # of a
    ]
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    assert len(calls) == 5
    for call in calls:
        types = call.rsplit(" : ", 1)[1]
        assert "tensor<128x" in types and "tensor<512x" not in types and "x64x" not in types
    assert "all_gather" not in text and "all_to_all" not in text
    assert text.count('"stablehlo.all_reduce"') == 2
    assert ("partition_id" in text) == drops  # rows are numbered across the shards


@pytest.mark.parametrize("drops", [False, True])
def test_plain_xla_under_a_mesh_gathers_nothing(drops):
    options = {"dropout_rate": RATE, "dropout_key": jax.random.key(0)} if drops else {}
    (member,), mesh = draw_members(256, [(384, 16)]), make_mesh(4)

    def loss(x, a, b):
        y = lora_linear(
            x, member["w"], a, b, scale=2.0, kernels="xla", row_axes=(DATA_AXIS,), **options
        )
        return y.astype(jnp.float32).sum()

    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(DATA_AXIS))
    with jax.set_mesh(mesh):
        x = jax.device_put(draw(0, 8, 64, 256), rows)
        gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
        text = str(gradients.lower(x, member["a"], member["b"]).compile().as_text())
    assert "all-gather" not in text and "all-to-all" not in text
    assert "all-reduce" in text


@pytest.mark.parametrize(
    "shape, rate, message",
    [
        ((6, 64), 0.0, "x has 6 rows of rows, which 4 shards do not divide"),
        ((4, 24), 0.3, "with dropout a shard needs a multiple of 16 rows, got 24"),
    ],
)
def test_refuses_rows_that_the_shards_do_not_divide(shape, rate, message):
    with pytest.raises(ValueError, match=message):
        trace_sharded(shape, dropout_rate=rate, dropout_key=jax.random.key(0))
