"""A format of the tests' own: whole numbers of eight bits, with one scale per column."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from lorax_kernels import accumulation_dtype


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codes", "scales"], meta_fields=["dtype"]
)
@dataclasses.dataclass(frozen=True)
class Int8:
    """``codes · scales``, a product of float32 (or wider) that is rounded once."""

    codes: jax.Array
    scales: jax.Array
    dtype: jnp.dtype
    kernel_obstacle = "the kernel reads no int8"

    @property
    def shape(self):
        return self.codes.shape

    def dense(self, dtype=None):
        wide = self.codes.astype(self.scales.dtype) * self.scales[None, :]
        return wide.astype(self.dtype if dtype is None else dtype)


def store(matrix):
    wide = matrix.astype(accumulation_dtype(matrix.dtype))
    scales = jnp.max(jnp.abs(wide), axis=0) / 127
    codes = jnp.round(wide / jnp.where(scales, scales, 1)[None, :]).astype(jnp.int8)
    return Int8(codes, scales, matrix.dtype)
