"""Operands of the kernels, and the comparison of what they compute with float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lorax_kernels.lora_linear.dropout import keep_mask, keep_probability
from lorax_kernels.lora_linear.plan import MatmulConfig
from tests.kernels.interpreter import interpret

UNIT = {"bfloat16": 3.9e-3, "float16": 4.9e-4, "float32": 6e-8}


SMALL = MatmulConfig(block_n=128, stages=3)


SEED, RATE = jnp.array([123456789, 987654321, 48], jnp.uint32), 0.3


def draw(seed, *shape, dtype="bfloat16", scale=1.0):
    values = np.random.default_rng(seed).standard_normal(shape) * scale
    return values.astype(jnp.dtype(dtype))


def dropout_factors(m, k):
    """What dropout multiplies an (m, k) matrix with: 0, or 1 divided by what is kept."""
    row = jax.lax.broadcasted_iota(jnp.uint32, (m, k), 0)
    column = jax.lax.broadcasted_iota(jnp.uint32, (m, k), 1)
    keep = keep_mask(SEED[0], SEED[1], SEED[2], row, column, RATE)
    return np.where(keep, 1.0 / keep_probability(RATE), 0.0)


def check(kernel, formula, operands, cores=3):
    """Compares a kernel with `formula` in float64, by what plain XLA loses in its own dtype.

    Args:
        kernel: Returns the kernel's results.
        formula: ``formula(numpy or jax.numpy, *operands)`` returns what they should be.
        operands: Of the formula; float64 ones take the others' dtype in XLA.
        cores: Multiprocessors of the device.
    """
    with interpret(cores) as races:
        results = [np.asarray(v) for v in jax.block_until_ready(jax.jit(kernel)())]
        assert not races.found()
    compare(results, formula, operands)


def compare(results, formula, operands):
    dtype = operands[0].dtype
    exact = formula(np, *(v.astype(np.float64) for v in operands))
    plain = jax.jit(functools.partial(formula, jnp))(*(v.astype(dtype) for v in operands))
    for got, want, base in zip(results, exact, plain, strict=True):
        assert got.shape == want.shape and np.isfinite(got.astype(np.float64)).all()
        unit = UNIT[str(got.dtype)]
        for norm in (np.linalg.norm, lambda v: np.abs(v).max()):
            loss = norm(np.asarray(base, np.float64) - want)
            assert norm(got.astype(np.float64) - want) <= 2 * loss + 4 * unit * norm(want)
