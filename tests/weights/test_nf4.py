"""NF4: the bytes and values of bitsandbytes, and no dense copy between the passes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lorax.devices.mesh import DATA_AXIS, make_mesh
from lorax.weights.nf4 import NF4, NF4_DOUBLE
from lorax_kernels import lora_linear
from lorax_kernels.weights.nf4 import Nf4, quantise
from lorax_kernels.weights.nf4.arithmetic import mean, reciprocal
from lorax_kernels.weights.nf4.levels import EDGES, LEVELS, nested_edges, nested_levels
from lorax_kernels.weights.nf4.quantise import _nearest
from tests.bounds import distance, rounding
from tests.jaxprs import equations
from tests.weights.nf4_reference import dense, golden, quantised, state_of, stored

every_golden = pytest.mark.parametrize("case", golden())


def bits(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def arrays_of(matrix: Nf4):
    parts = matrix.to_bitsandbytes()
    return [None if part is None else np.asarray(part).reshape(-1) for part in parts]


def assert_equal_bytes(got, want):
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_array_equal(bits(one), bits(other))


def draw(seed, *shape, dtype="float32"):
    values = np.random.default_rng(seed).standard_normal(shape) * 0.02
    values.reshape(-1)[64:128] = 0
    return values.astype(jnp.dtype(dtype))


@every_golden
def test_bytes_are_those_of_bitsandbytes_on_a_cpu(case):
    tensors, double = golden()[case], case.endswith("double")
    offset = state_of(tensors).get("nested_offset")
    given = None if offset is None else jnp.float32(offset)
    weight = jnp.asarray(tensors["input"])
    got = quantise(weight.T, double=double, rule="cpu", offset=given)
    want = stored(tensors)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert_equal_bytes(arrays_of(got), arrays_of(want))
    # The reference of the other cases agrees.
    assert_equal_bytes(quantised(tensors["input"], double, "cpu", offset), arrays_of(want))


@pytest.mark.as_shipped
@every_golden
def test_values_are_those_of_bitsandbytes(case):
    tensors = golden()[case]
    matrix, want = stored(tensors), tensors["dequantised"]
    got = jax.jit(Nf4.dense)(matrix)
    assert (got.shape, got.dtype) == (matrix.shape, want.dtype)
    np.testing.assert_array_equal(bits(got.T), bits(want))
    for name, levels in (("", LEVELS), ("nested_", nested_levels())):
        if (table := tensors.get(f"weight.{name}quant_map")) is not None:
            np.testing.assert_array_equal(table, np.array(levels, np.float32))


@pytest.mark.as_shipped
@pytest.mark.parametrize(
    "shape, dtype, double",
    [
        ((7, 33), "float16", True),
        ((5, 100), "float32", False),
        ((300, 128), "bfloat16", True),
        ((2, 64), "bfloat16", True),
        ((1, 1), "float32", False),
    ],
    ids=str,
)
def test_bytes_and_values_are_by_default_those_of_a_gpu(shape, dtype, double):
    weight = draw(0, *shape, dtype=dtype)
    want = quantised(weight, double, "cuda")
    got = quantise(jnp.asarray(weight).T, double=double)
    assert_equal_bytes(arrays_of(got), want)
    values = jax.jit(Nf4.dense)(got).T
    np.testing.assert_array_equal(bits(values), bits(dense(*want, shape, jnp.dtype(dtype))))


def test_a_block_of_zeros_is_zero_by_either_rule():
    zeros = jnp.zeros((64, 2))
    for rule, code in (("cuda", 0x00), ("cpu", 0x77)):
        matrix = quantise(zeros, double=True, rule=rule)
        assert set(np.asarray(matrix.codes).flat) == {code}
        np.testing.assert_array_equal(matrix.dense(), zeros)


def test_a_shorter_last_block_is_divided_by_its_scale_on_a_cpu():
    random = np.random.default_rng(0)
    scales = random.uniform(1, 2, (2000, 1)).astype(np.float32)
    edges = np.array(EDGES, np.float32)
    values = edges * scales
    differ = (values / scales > edges) != (values * (1 / scales) > edges)
    at = np.argwhere(differ)[:20]
    assert len(at) == 20
    for i, j in at:
        weight = np.array([[scales[i, 0], values[i, j]]])
        found = []
        for rule in ("cpu", "cuda"):
            found.append(arrays_of(quantise(jnp.asarray(weight).T, rule=rule)))
            assert_equal_bytes(found[-1], quantised(weight, False, rule))
        assert found[0][0] != found[1][0]


def test_a_scale_midway_between_two_codes_takes_the_even_one():
    edges = np.array(nested_edges(), np.float32)
    lower = np.arange(255)
    np.testing.assert_array_equal(_nearest(jnp.asarray(edges)), lower + lower % 2)
    above, below = np.nextafter(edges, np.float32(2)), np.nextafter(edges, np.float32(-2))
    np.testing.assert_array_equal(_nearest(jnp.asarray(above)), lower + 1)
    np.testing.assert_array_equal(_nearest(jnp.asarray(below)), lower)


@pytest.mark.parametrize("k, n", [(128, 96), (33, 7)])
@pytest.mark.parametrize("format", [NF4, NF4_DOUBLE], ids=lambda format: format.name)
def test_a_dequantised_matrix_is_stored_without_loss(format, k, n):
    matrix = format.store(jnp.asarray(draw(1, n, k).T))
    assert matrix.codes.nbytes == math.ceil(k * n / 2)
    assert format.bytes((k, n), "float32") == sum(v.nbytes for v in jax.tree.leaves(matrix))
    again = quantise(matrix.dense("float32"))
    np.testing.assert_array_equal(matrix.dense("float32"), again.dense("float32"))


@pytest.mark.parametrize(
    "spec", [PartitionSpec(DATA_AXIS), PartitionSpec(None, DATA_AXIS)], ids=str
)
def test_a_device_stores_its_own_part_of_the_matrix(spec):
    mesh, matrix = make_mesh(4), jnp.asarray(draw(4, 256, 64))
    leaves = jax.tree.leaves(NF4.store(matrix))
    for leaf, part in zip(leaves, NF4.parts(spec), strict=True):
        placed = jax.device_put(leaf, NamedSharding(mesh, part))
        for shard in placed.addressable_shards:
            own = NamedSharding(mesh, spec).devices_indices_map(matrix.shape)[shard.device]
            alone = NF4.store(matrix[own])
            want = alone.codes if leaf.dtype == jnp.uint8 else alone.absmax
            np.testing.assert_array_equal(shard.data, want)


def test_scales_take_an_eighth_of_the_codes_or_a_thirtieth():
    shape = 4096, 14336
    weights = math.prod(shape)
    assert NF4.bytes(shape, "bfloat16") == weights / 2 * (1 + 1 / 8)
    assert weights / 2 * (1 + 1 / 32) < NF4_DOUBLE.bytes(shape, "bfloat16") < weights / 2 * 1.033


def test_another_rule_is_refused():
    with pytest.raises(ValueError, match="rule must be cuda or cpu, got 'gpu'"):
        quantise(jnp.zeros((64, 1)), rule="gpu")


@functools.cache
def products():
    """Returns a product's stored matrix, its pull-back, and what both are a function of."""
    k, n, m, r = 128, 192, 24, 4
    keys = jax.random.split(jax.random.key(0), 3)
    x, a, b = (jax.random.normal(*v) for v in zip(keys, ((m, k), (k, r), (r, n)), strict=True))

    def call(x, w):
        return lora_linear(x, w, a, b, scale=2.0)

    return quantise(jnp.asarray(draw(3, k, n)), double=True), call, x


def test_the_gradient_is_of_the_input_alone():
    w, call, x = products()
    dy = jnp.ones((x.shape[0], w.shape[1]))
    dx, dw = jax.vjp(call, x, w)[1](dy)
    want, _ = jax.vjp(call, x, w.dense())[1](dy)
    assert distance(dx, want) <= rounding(w.shape[1])
    for leaf in jax.tree.leaves(dw):
        assert leaf.dtype == jax.dtypes.float0 or not np.any(leaf)


def test_neither_pass_keeps_a_dense_copy():
    w, call, x = products()
    y, pull = jax.vjp(functools.partial(call, w=w), x)
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.size >= math.prod(w.shape) // 2]
    assert [(leaf.shape, leaf.dtype) for leaf in kept] == [(w.codes.shape, np.uint8)]
    # One gather for the codes and one for the scales, after the barrier of the backward pass.
    found = [equation.primitive.name for equation in equations(jax.make_jaxpr(pull)(y).jaxpr)]
    assert found.count("gather") == 2 and "optimization_barrier" in found
    both = jax.jit(lambda x, w: (lambda y, pull: pull(y))(*jax.vjp(lambda x: call(x, w), x)))
    text = both.lower(x, w).compile().as_text()
    assert text.count(" gather(") == 4, text


def test_reciprocals_are_the_nearest_numbers():
    values = np.exp(np.random.default_rng(0).uniform(-80, 80, 5000)).astype(np.float32)
    values = np.concatenate([values, 2.0 ** np.arange(-126, 126), [0, np.inf]]).astype(np.float32)
    with np.errstate(divide="ignore"):
        want = np.float32(1) / values
    np.testing.assert_array_equal(jax.jit(reciprocal)(values), want)


@pytest.mark.as_shipped
@pytest.mark.parametrize("count", [1, 3, 100, 3073])
def test_means_are_the_nearest_numbers(count):
    compiled = jax.jit(mean)
    for seed in range(20):
        values = np.random.default_rng(seed).lognormal(sigma=3, size=count).astype(np.float32)
        assert compiled(values) == np.float32(math.fsum(values.tolist()) / count)
