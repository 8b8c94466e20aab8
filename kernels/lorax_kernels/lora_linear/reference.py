"""The definition of `lora_linear` in plain JAX; every implementation is tested against it."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from lorax_kernels.dtypes import accumulation_dtype
from lorax_kernels.lora_linear.dropout import apply_dropout
from lorax_kernels.weights import Matrix, dense


def lora_linear_reference(
    x: Float[Array, "m k"],
    w: Matrix,
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

    def dot(p, q):
        return jnp.dot(p, q, preferred_element_type=accumulation_dtype(dtype))

    h = dot(apply_dropout(x, dropout_rate, dropout_key), a.astype(dtype))
    update = dot(h.astype(dtype), b.astype(dtype))
    return (dot(x, dense(w, dtype)) + scale * update).astype(dtype)
