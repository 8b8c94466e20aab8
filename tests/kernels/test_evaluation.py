"""What NumPy evaluates is what JAX compiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.kernels import evaluation

INTEGERS = np.array([[-7, -3, 0], [5, 2, 9]], np.int32)
DIVISORS = np.array([[2, -2, 3], [-2, 4, 9]], np.int32)
FLOATS = np.array([[-1.5, 0.25, 3.0], [2.0, -0.5, 7.0]], np.float32)
TWO = {
    "add": lax.add, "and": lax.bitwise_and, "div": lax.div, "eq": lax.eq, "ge": lax.ge,
    "gt": lax.gt, "le": lax.le, "lt": lax.lt, "max": lax.max, "min": lax.min, "mul": lax.mul,
    "ne": lax.ne, "or": lax.bitwise_or, "rem": lax.rem, "sub": lax.sub, "xor": lax.bitwise_xor,
}  # fmt: skip
ONE = {
    "exp": lax.exp,
    "neg": lax.neg,
    "sign": lax.sign,
    "rsqrt": lambda v: lax.rsqrt(lax.max(v, jnp.float32(0.25))),
}
OTHERS = {
    "broadcast_in_dim": lambda v: lax.broadcast_in_dim(v, (2, 4, 3), (0, 2)),
    "clamp": lambda v: lax.clamp(jnp.float32(-1), v, jnp.float32(2)),
    "convert_element_type": lambda v: (v / 3.0).astype(jnp.bfloat16),
    "dot_general": lambda v: jnp.dot(v, v.T, preferred_element_type=jnp.float32),
    "dynamic_slice": lambda v: [
        lax.dynamic_slice(v, (jnp.int32(i), jnp.int32(j)), (1, 2)) for i, j in ((-5, 1), (9, 9))
    ],
    "iota": lambda v: v + lax.broadcasted_iota(jnp.int32, (2, 3), 1).astype(v.dtype),
    "not": lambda v: ~(v < 1),
    "reshape": lambda v: v.reshape(3, 2),
    "select_n": lambda v: jnp.where(v < 1, v, 2 * v),
    "shift_left": lambda v: (v * v).astype(jnp.uint32) << jnp.uint32(3),
    "shift_right_logical": lambda v: (9 * v * v).astype(jnp.uint32) >> jnp.uint32(5),
    "slice": lambda v: v[0:2:1, 1:3:2],
    "squeeze": lambda v: v[:1].squeeze(0),
    "transpose": lambda v: v.T,
}


def compare(function, *operands):
    got = evaluation.evaluate(jax.make_jaxpr(function)(*operands), operands)
    for ours, right in zip(got, jax.tree.leaves(jax.jit(function)(*operands)), strict=True):
        assert ours.dtype == right.dtype and ours.shape == right.shape
        np.testing.assert_allclose(np.float64(ours), np.float64(right), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", TWO)
def test_an_operation_on_two_arrays(name):
    compare(TWO[name], INTEGERS, DIVISORS)
    if name not in ("and", "or", "xor"):
        compare(TWO[name], FLOATS, FLOATS[:, ::-1].copy())


@pytest.mark.parametrize("name", ONE)
def test_an_operation_on_one_array(name):
    compare(ONE[name], FLOATS)


@pytest.mark.parametrize("name", OTHERS)
def test_another_operation(name):
    compare(OTHERS[name], FLOATS)


def test_products_are_summed_in_float32():
    wide = np.random.default_rng(0).standard_normal((2, 512)).astype(jnp.bfloat16)
    product = lambda v: jnp.dot(v, v.T, preferred_element_type=jnp.float32)
    (got,) = evaluation.evaluate(jax.make_jaxpr(product)(wide), [wide])
    exact = wide.astype(np.float64) @ wide.astype(np.float64).T
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-4)


def test_every_operation_that_numpy_is_told_is_compared():
    told = {*evaluation._ARITHMETIC, *evaluation._SHAPES}
    assert told <= {*TWO, *ONE, *OTHERS}


def test_an_operation_that_numpy_is_not_told_is_named():
    with pytest.raises(evaluation.EvaluationError, match="cumsum: say in this file"):
        compare(lambda v: jnp.cumsum(v, axis=1), FLOATS)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_loops_branches_and_callbacks(n):
    seen = []

    def see(i, v):
        seen.append((i, np.asarray(v).tolist()))
        return np.float32(i)

    def function(n, v):
        def step(i, total):
            total = lax.cond(i % 2 == 0, lambda t: t + v, lambda t: t * v, total)
            return total + jax.experimental.io_callback(
                see, jax.ShapeDtypeStruct((), v.dtype), i, v
            )

        total = lax.fori_loop(0, 3, step, v)
        _, total = lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, step(*c)), (0, total))
        return lax.switch(n, [lambda t: t, lambda t: -t, lambda t: 2 * t], total)

    compare(function, np.int32(n), np.float32(1.5))
    ours, theirs = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert ours == [(int(i), v) for i, v in theirs] and len(ours) == 3 + n


def test_a_failure_of_one_thread_ends_those_that_wait_for_it(monkeypatch):
    import jax.experimental.pallas.mosaic_gpu as plgpu

    from tests.kernels.interpreter import interpret

    def body(out, full):
        thread = lax.axis_index("warpgroup")

        @jax.experimental.pallas.when(thread == 0)
        def _():
            out[...] = jnp.cumsum(jnp.ones(128))
            plgpu.barrier_arrive(full)

        jax.experimental.pallas.when(thread == 1)(lambda: plgpu.barrier_wait(full))

    kernel = plgpu.kernel(
        body, out_type=jax.ShapeDtypeStruct((128,), jnp.float32), num_threads=2,
        thread_name="warpgroup", scratch_types={"full": plgpu.Barrier()},
    )  # fmt: skip

    def fail(*_, **__):
        raise ArithmeticError("this operation fails")

    monkeypatch.setitem(evaluation._SHAPES, "cumsum", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="this operation fails"), interpret(1):
        jax.block_until_ready(kernel())
