"""Interpreted projections and gradients: narrow products, by themselves and from one read."""

import jax.numpy as jnp
import numpy as np
import pytest

from lorax_kernels.lora_linear.gradient import gradient
from lorax_kernels.lora_linear.kernel import grouped_matmul
from lorax_kernels.lora_linear.plan import Dropout, MatmulConfig, Term
from lorax_kernels.lora_linear.project import project
from lorax_kernels.lora_linear.skinny import SkinnyConfig
from tests.kernels.interpreter import interpret
from tests.kernels.operands import RATE, SEED, SMALL, check, draw, dropout_factors

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_after_the_other")]


def wide(xp, p, q):
    """The product in float32, as XLA makes it from narrow operands."""
    return p @ q if xp is np else jnp.dot(p, q, preferred_element_type=jnp.float32)


@pytest.mark.parametrize(
    "m, c, r, block_c, boxes, dtype, drops",
    [
        (200, 384, 16, 384, 2, "bfloat16", False),
        (136, 384, 64, 256, 4, "bfloat16", False),
        (16, 320, 128, 128, 2, "float16", False),
        (72, 384, 32, 256, 2, "bfloat16", False),
        (200, 192, 32, 256, 4, "bfloat16", True),
        (200, 192, 16, 256, 4, "bfloat16", True),
        (136, 320, 64, 128, 2, "bfloat16", True),
    ],
)
def test_project(m, c, r, block_c, boxes, dtype, drops):
    t, u = draw(0, m, c, dtype=dtype), draw(1, r, c, dtype=dtype, scale=c**-0.5)
    config = SkinnyConfig(1, block_c, 3, boxes)
    mask = Dropout(SEED, RATE) if drops else None
    factors = dropout_factors(m, c) if drops else np.ones((m, c))
    parts = -(-c // block_c)

    def formula(xp, t, u, factors):
        dot = lambda cs: wide(xp, (t * factors)[:, cs], u[:, cs].T)
        cuts = [dot(slice(i * block_c, (i + 1) * block_c)) for i in range(parts)]
        return [cuts[0].astype(t.dtype)] if parts == 1 else cuts

    check(lambda: list(project(t, u, config=config, mask=mask)), formula, (t, u, factors))


@pytest.mark.parametrize(
    "m, c, r, row_blocks, tiles, dtype, drops",
    [
        (200, 192, 16, 1, 2, "bfloat16", False),
        (300, 384, 64, 2, 1, "bfloat16", False),
        (200, 192, 32, 2, 2, "float16", False),
        (136, 320, 32, 1, 1, "bfloat16", True),
        (16, 256, 192, 1, 1, "float16", False),
        (300, 128, 128, 3, 1, "bfloat16", False),
        (200, 320, 64, 2, 2, "bfloat16", True),
    ],
)
def test_gradient(m, c, r, row_blocks, tiles, dtype, drops):
    t, v = draw(0, m, c, dtype=dtype), draw(1, m, r, dtype=dtype)
    config = SkinnyConfig(row_blocks, tiles * 128, 3, v_slots=2 if r <= 128 else 1)
    mask = Dropout(SEED, RATE) if drops else None
    factors = dropout_factors(m, c) if drops else np.ones((m, c))
    kernel = lambda: [gradient(t, v, config=config, mask=mask)[0].sum(0)]
    check(kernel, lambda xp, t, v, factors: [wide(xp, (t * factors).T, v)], (t, v, factors))


@pytest.mark.parametrize(
    "m, c, u_rank, row_blocks, tiles, columns",
    [
        (200, 320, 16, 1, 2, None),
        (136, 384, 64, 2, 1, None),
        (300, 256, 16, 3, 2, (64, 16)),
        (136, 256, 16, 2, 1, (0, 32)),
        (136, 256, 32, 1, 2, None),
        (16, 128, 64, 1, 1, (128, 64)),
    ],
)
def test_gradient_and_projection_from_one_read(m, c, u_rank, row_blocks, tiles, columns):
    t, u = draw(0, m, c), draw(1, u_rank, c, scale=c**-0.5)
    first, r = columns or (0, u_rank)
    v = np.full((m, first + max(r, 64)), np.nan, t.dtype) if columns else draw(2, m, r)
    v[:, first : first + r] = draw(2, m, r)
    config = SkinnyConfig(row_blocks, tiles * 128, 2)

    def kernel():
        sums, parts = gradient(t, v, u, config=config, columns=columns)
        return [sums.sum(0), parts.sum(0)]

    formula = lambda xp, t, u, v: [wide(xp, t.T, v), wide(xp, t, u.T)]
    check(kernel, formula, (t, u, v[:, first : first + r]))


def test_gradient_reads_only_the_columns_it_is_told():
    m, c = 136, 256
    t, v = draw(0, m, c), draw(1, m, 256)
    v[:, :64], v[:, 192:] = np.nan, np.nan
    kernel = lambda: [gradient(t, v, config=SkinnyConfig(2, 256, 3), columns=(64, 128))[0].sum(0)]
    check(kernel, lambda xp, t, v: [wide(xp, t.T, v)], (t, v[:, 64:192]))


@pytest.mark.parametrize(
    "dtype, config, options, message",
    [
        ("float32", SMALL, {}, "bfloat16 and float16 operands, got float32"),
        ("bfloat16", MatmulConfig(block_m=64), {}, "no tile that the matrix units take"),
        ("bfloat16", MatmulConfig(block_n=96), {}, "no tile that the matrix units take"),
        ("bfloat16", MatmulConfig(stages=6), {}, "bytes of shared memory"),
        (
            "bfloat16",
            MatmulConfig(block_n=128, stages=2),
            {"transposed": True, "dropout": Dropout(SEED, RATE)},
            "rank over 128 with dropout does not fit the ring",
        ),
    ],
)
def test_refuses_what_it_cannot_multiply(dtype, config, options, message):
    x, w = draw(0, 128, 192, dtype=dtype), draw(1, 192, 192, dtype=dtype)
    with interpret(), pytest.raises(ValueError, match=message):
        grouped_matmul([[Term(x, (w,))]], config=config, **options)
