"""Correctly rounded float32 results on every device.

On GPUs XLA divides by `div.full`, which may be two units in the last place off. To get the bytes of
another library, the results must be the nearest float32 numbers.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

_HIDDEN = 1 << 23  # the leading one of a float32's 24 significant bits


def reciprocal(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns the float32 nearest to ``1 / x``, for x ≥ 0.

    Where x or the result is not a normal number, it is the device's quotient: infinity for 0.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    exponent = bits >> 23
    significand = (bits & (_HIDDEN - 1)) | _HIDDEN
    # Long division of 2^47 by the significand, bit by bit: the quotient has 24 bits.
    begin = jnp.full_like(significand, _HIDDEN), jnp.zeros_like(significand)

    def next_bit(_, state):
        remainder = state[0] << 1
        fits = remainder >= significand
        remainder = jnp.where(fits, remainder - significand, remainder)
        return remainder, (state[1] << 1) | fits.astype(jnp.uint32)

    remainder, quotient = lax.fori_loop(0, 24, next_bit, begin)
    # A remainder of exactly half a unit is impossible: the divisor would have to be a power of two.
    quotient += (remainder << 1 > significand).astype(jnp.uint32)
    result = ((253 - exponent) << 23) | (quotient & (_HIDDEN - 1))
    result = jnp.where(significand == _HIDDEN, (254 - exponent) << 23, result)
    normal = (exponent > 0) & (exponent < 253)
    return jnp.where(normal, lax.bitcast_convert_type(result, jnp.float32), 1 / x)


def mean(values: Float[Array, " count"]) -> Float[Array, ""]:
    """Returns the float32 nearest to the mean of at most 2^22 numbers.

    The sum and the remainder of the division are pairs of float32 numbers, of twice the precision.
    """
    count = values.size
    pairs = values, jnp.zeros_like(values)
    total, low = lax.reduce(pairs, (jnp.float32(0), jnp.float32(0)), _sum, (0,))
    # XLA replaces a division by a constant with a multiplication by its reciprocal.
    divisor = lax.optimization_barrier(jnp.float32(count))
    quotient = total / divisor
    upper = _upper(quotient)
    rest = total
    # Products of two 12-bit numbers are exact, and so is every difference here.
    for part in (upper, quotient - upper):
        rest = rest - part * (count & ~0xFFF) - part * (count & 0xFFF)
    return quotient + (rest + low) / divisor


def _sum(p: tuple[jax.Array, jax.Array], q: tuple[jax.Array, jax.Array]):
    """Returns the sum of two pairs: the rounded sum and its rounding error.

    Source: Knuth, The Art of Computer Programming 2, section 4.2.2, theorem B
    """
    total = p[0] + q[0]
    taken = total - p[0]
    rest = (p[0] - (total - taken)) + (q[0] - taken) + p[1] + q[1]
    high = total + rest
    return high, rest - (high - total)


def _upper(x: jax.Array) -> jax.Array:
    """Returns the upper twelve of a float32's 24 significant bits, as a float32."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return lax.bitcast_convert_type(bits >> 12 << 12, jnp.float32)
