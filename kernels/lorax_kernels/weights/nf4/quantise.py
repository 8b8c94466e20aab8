"""Quantisation to NF4 on the device, to the same bytes as bitsandbytes."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from lorax_kernels.weights.nf4.arithmetic import mean, reciprocal
from lorax_kernels.weights.nf4.levels import BLOCK, EDGES, LEVELS, NESTED_BLOCK, nested_edges
from lorax_kernels.weights.nf4.order import in_matrix_order
from lorax_kernels.weights.nf4.weight import Nf4

type Rule = Literal["cuda", "cpu"]
"""bitsandbytes' implementation whose bytes are reproduced: on a GPU and on a CPU they differ.

====================  =======================================  ====================================
..                    cuda                                     cpu
====================  =======================================  ====================================
block of zeros        code 0, the value -0                     code 7, the value 0
shorter last block    times the reciprocal of absmax           divided by absmax, which is not 0
nested code           the nearest, on a tie the even one       looked up at one of 65,536 points
====================  =======================================  ====================================
"""

_SMALLEST = 1e-38  # bitsandbytes' least absmax on a CPU
_POINTS = 65536
_ZERO = LEVELS.index(0.0)


@functools.partial(jax.jit, static_argnames=("double", "rule"))
def quantise(
    matrix: Float[Array, "k n"],
    *,
    double: bool = False,
    rule: Rule = "cuda",
    offset: Float[Array, ""] | None = None,
) -> Nf4:
    """Returns a matrix in NF4; the dtype of its matmuls is that of the matrix.

    Args:
        matrix: Finite numbers; float64 is rounded to float32 first.
        double: Quantises the absmax too.
        rule: The implementation whose bytes are reproduced.
        offset: The mean of all absmax, if it was computed elsewhere: in float32 it depends on the
            order of the sum. None is the exact mean, rounded.

    Raises:
        ValueError: If `rule` is no such name.
    """
    if rule not in ("cuda", "cpu"):
        raise ValueError(f"rule must be cuda or cpu, got {rule!r}")
    k, n = matrix.shape
    rows = 1 if k % BLOCK else n
    flat = matrix.T.astype(jnp.float32).reshape(rows, k * n // rows)
    scaled, absmax = _scaled(flat, rule)
    codes = _codes(scaled)[:, : flat.shape[1]]
    if k * n % 2:  # the last byte's lower half
        codes = jnp.pad(codes, ((0, 0), (0, 1)), constant_values=_ZERO)
    packed = (codes[:, 0::2] << 4 | codes[:, 1::2]).reshape(-1)
    nested_absmax = None
    center = None
    if double:
        center = mean(absmax.reshape(-1)) if offset is None else jnp.asarray(offset, jnp.float32)
        absmax, nested_absmax = _nested(absmax - center, rule)
    packed, absmax = in_matrix_order(packed, absmax, (k, n))
    return Nf4(packed, absmax, nested_absmax, center, (k, n), matrix.dtype)


def _in_blocks(flat: Float[Array, "rows length"], block: int) -> Float[Array, "rows blocks block"]:
    """Splits rows into blocks; zeros fill the last one."""
    rows, length = flat.shape
    return jnp.pad(flat, ((0, 0), (0, -length % block))).reshape(rows, -1, block)


def _scaled(flat: Float[Array, "rows length"], rule: Rule) -> tuple[jax.Array, jax.Array]:
    """Returns the elements divided by their block's absmax, row by row, and absmax."""
    blocks = _in_blocks(flat, BLOCK)
    absmax = jnp.abs(blocks).max(axis=2)
    inverse = reciprocal(absmax)
    if rule == "cpu":
        inverse = jnp.where(absmax == 0, 1 / _SMALLEST, inverse)
    scaled = blocks * inverse[:, :, None]
    if rule == "cpu":
        if flat.shape[1] % BLOCK:
            last = jnp.where(absmax[0, -1] == 0, _SMALLEST, absmax[0, -1])
            absmax = absmax.at[0, -1].set(last)
            scaled = scaled.at[0, -1].set(_divided(blocks[0, -1], last))
        scaled = jnp.clip(scaled, -1, 1)
    return scaled.reshape(flat.shape[0], -1), absmax


def _divided(values: jax.Array, by: jax.Array) -> jax.Array:
    """Returns values / by: XLA replaces division by a scalar with a multiplication."""
    return values / lax.optimization_barrier(jnp.broadcast_to(by, values.shape))


def _codes(scaled: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """Returns the number of edges below each value: 0 for NaN."""
    codes = jnp.zeros(scaled.shape, jnp.uint8)
    for edge in EDGES:
        codes += (scaled > edge).astype(jnp.uint8)
    return codes


def _nested(values: Float[Array, "rows blocks"], rule: Rule) -> tuple[jax.Array, jax.Array]:
    """Returns the codes of the centred absmax, and the absmax of each 256 of them."""
    groups = _in_blocks(values.reshape(1, -1), NESTED_BLOCK)[0]
    absmax = jnp.abs(groups).max(axis=1)
    scaled = groups * reciprocal(absmax)[:, None]
    codes = _nearest(scaled) if rule == "cuda" else _nearest_point(scaled)
    codes = jnp.where(absmax[:, None] == 0, 0, codes).astype(jnp.uint8)
    return codes.reshape(-1)[: values.size].reshape(values.shape), absmax


def _nearest(scaled: jax.Array) -> jax.Array:
    """Returns the code of the nearest level, on a tie the even one."""
    edges = jnp.asarray(nested_edges(), jnp.float32)
    lower = jnp.searchsorted(edges, scaled, side="left")
    return jnp.where(lower % 2 == 1, jnp.searchsorted(edges, scaled, side="right"), lower)


def _nearest_point(scaled: jax.Array) -> jax.Array:
    """Returns the code of the level nearest to the nearest of equally spaced points.

    For a value near the midpoint of two levels this may be the second nearest level.
    """
    edges = jnp.asarray(nested_edges(), jnp.float32)
    points = _divided(jnp.arange(_POINTS, dtype=jnp.float32) * 2, jnp.float32(_POINTS - 1)) - 1
    codes = jnp.searchsorted(edges, points, side="left")
    half = (jnp.clip(scaled, -1, 1) + 1) * 0.5
    # Otherwise the compiler may contract this into a fused multiply-add, which rounds once.
    at = lax.optimization_barrier(half * (_POINTS - 1)) + 0.5
    return codes.at[jnp.nan_to_num(at).astype(jnp.int32)].get(mode="clip")
