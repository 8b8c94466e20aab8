"""Dropout as a pure function of (seed, row, column): every pass recomputes the same mask.

Row and column are those of the element in the whole matrix, so a mask does not depend on the tiling
of the matrix, on the implementation, or on the device.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt32

LEVELS = 1 << 16  # an element is kept when its 16 random bits are below keep · 2¹⁶


def threshold(rate: float) -> int:
    """Returns how many of the `LEVELS` values of 16 random bits keep an element."""
    return round((1.0 - rate) * LEVELS)


def keep_probability(rate: float) -> float:
    """Returns the probability of keeping an element: ``1 - rate`` to within 2⁻¹⁷."""
    return threshold(rate) / LEVELS


def seed_words(key: Key[Array, ""]) -> UInt32[Array, "2"]:
    """Returns two random words for `key`: keys that are close, such as 0 and 1, share neither."""
    return jax.random.bits(key, (2,), jnp.uint32)


def random_bits(seed0, seed1, row, column):
    """Returns 32 random bits per (row, column): two rounds of multiply and xor-shift.

    The words of the seed enter before and between the rounds, so that two keys are two functions
    and not two windows of one. Works on arrays and, inside a kernel, on tiles.

    Source: the rounds are `lowbias32` of C. Wellons's hash-prospector, public domain.
    """

    def word(value):
        return jnp.uint32(value)

    bits = (row * word(0x9E3779B1)) ^ (column * word(0x85EBCA77) + seed0)
    bits = (bits ^ (bits >> word(16))) * word(0x7FEB352D)
    bits = ((bits ^ (bits >> word(15))) + seed1) * word(0x846CA68B)
    return bits ^ (bits >> word(16))


def keep_mask(seed0, seed1, row0, row, column, rate: float):
    """Returns which elements of the rows ``row0 + row`` are kept; `row0` is a multiple of 16.

    Rows i and i + 8 of every 16 take the two halves of one draw. A thread holds such a pair in the
    tensor cores' layout. Because `row0` is separate, the compiler sees that the draw is the same.
    """
    word = jnp.uint32
    bits = random_bits(seed0, seed1, row0 + (row & word(0xFFFFFFF7)), column)
    half = jnp.where((row & word(8)) != word(0), bits >> word(16), bits & word(0xFFFF))
    return half < word(threshold(rate))


def apply_dropout(
    x: Float[Array, "m k"], rate: float, key: Key[Array, ""] | None
) -> Float[Array, "m k"]:
    """Zeroes each element with probability `rate` and divides the others by the share kept.

    A pure function of `key`, so the backward pass recomputes the mask instead of storing it.
    """
    if rate == 0.0:
        return x
    assert key is not None
    seed = seed_words(key)
    row = jax.lax.broadcasted_iota(jnp.uint32, x.shape, 0)
    column = jax.lax.broadcasted_iota(jnp.uint32, x.shape, 1)
    keep = keep_mask(seed[0], seed[1], jnp.uint32(0), row, column, rate)
    kept = x * jnp.asarray(1.0 / keep_probability(rate), x.dtype)
    return jnp.where(keep, kept, jnp.zeros((), x.dtype))
