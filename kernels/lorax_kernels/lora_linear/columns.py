"""Vectors of the columns of a group, biases and factors, as the kernels read and return them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lorax_kernels.lora_linear.plan import MatmulConfig

Vectors = Sequence[jax.Array | None]


def padded(
    vectors: Vectors, widths: Sequence[int], config: MatmulConfig, missing: float
) -> jax.Array | None:
    """Returns a vector for all members' columns, each part padded to whole tiles, float32.

    Args:
        vectors: Per member, or None, in whose place `missing` stands.
        widths: Columns of each member.
        config: The tiling of the matmul.
        missing: What leaves a result as it is.

    Returns:
        The vector, or None if all members are without.
    """
    if all(vector is None for vector in vectors):
        return None
    parts = []
    for n, vector in zip(widths, vectors, strict=True):
        whole = -(-n // config.block_n) * config.block_n
        part = jnp.full((n,), missing, jnp.float32) if vector is None else vector
        parts.append(jnp.pad(part.astype(jnp.float32), (0, whole - n)))
    return jnp.concatenate(parts)


def pair(factors: Vectors, n: int, config: MatmulConfig) -> list[jax.Array]:
    """Returns the factors of gate and up, (n,) each, padded to whole tiles; or none of both."""
    both = padded(factors, (n, n), config, 1.0)
    return [] if both is None else list(jnp.split(both, 2))


def added(factors: Vectors, sums: Sequence[jax.Array]) -> list[jax.Array | None]:
    """Returns the gradients of the factors of gate and up from a kernel's parts, if it has any."""
    totals = sums[0].sum(axis=1) if sums else [None] * len(factors)
    return [None if f is None else total for f, total in zip(factors, totals, strict=True)]
