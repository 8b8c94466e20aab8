"""What `lora_linear` means, in plain JAX. Every other implementation is tested against this."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Returns float64 for float64 operands and float32 for all others."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def apply_dropout(
    x: Float[Array, "m k"], rate: float, key: Key[Array, ""] | None
) -> Float[Array, "m k"]:
    """Zeroes each element with probability `rate` and scales the others by ``1 / (1 - rate)``.

    A pure function of `key`, so the backward pass draws the same mask again instead of storing it.
    """
    if rate == 0.0:
        return x
    assert key is not None
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


def lora_linear_reference(
    x: Float[Array, "m k"],
    w: Float[Array, "k n"],
    a: Float[Array, "k r"],
    b: Float[Array, "r n"],
    *,
    scale: float,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "m n"]:
    """Computes ``x·w + scale · (dropout(x)·a)·b``: operands in `x`'s dtype, sums in float32.

    Source: Hu et al. 2021, "LoRA", eq. 3, https://arxiv.org/abs/2106.09685
    """
    dtype = x.dtype
    dot = lambda p, q: jnp.dot(p, q, preferred_element_type=accumulation_dtype(dtype))
    h = dot(apply_dropout(x, dropout_rate, dropout_key), a.astype(dtype))
    update = dot(h.astype(dtype), b.astype(dtype))
    return (dot(x, w.astype(dtype)) + scale * update).astype(dtype)
