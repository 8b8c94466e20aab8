"""A format of the tests' own: whole numbers of eight bits, with one scale per column."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lorax.weights.format import axes_of
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


class _Format:
    name = "int8"
    files = {"codes": "weight", "scales": "SCB"}  # noqa: RUF012

    def claims(self, model):
        return True

    def store(self, matrix):
        return store(matrix)

    def dense(self, stored, dtype=None):
        return stored.dense(dtype)

    def bytes(self, shape, dtype):
        k, n = shape
        return k * n + n * accumulation_dtype(jnp.dtype(dtype)).itemsize

    def parts(self, spec):
        return spec, PartitionSpec(axes_of(spec)[1])

    def obstacle(self, shape, dtype):
        return Int8.kernel_obstacle


INT8 = _Format()
