"""A frozen matrix in eight bits, with one scale per output column."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float
from jaxtyping import Int8 as Int8Array

LARGEST = 127


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codes", "scale"], meta_fields=["dtype"]
)
@dataclasses.dataclass(frozen=True)
class Int8:
    """``codes · scale``, computed in float32 and rounded once.

    Attributes:
        codes: Whole numbers from -127 to 127.
        scale: The largest magnitude of each column over 127.
        dtype: The dtype of its matmuls.
    """

    codes: Int8Array[Array, "k n"]
    scale: Float[Array, " n"]
    dtype: DTypeLike

    @property
    def shape(self) -> tuple[int, int]:
        """The matrix's shape, (k, n)."""
        k, n = self.codes.shape
        return k, n

    @property
    def kernel_obstacle(self) -> None:
        """None: the fused kernel reads the dense matrix."""

    def dense(self, dtype: DTypeLike | None = None) -> Float[Array, "k n"]:
        """Returns the dense matrix, the value of the stored arrays. None is its own dtype."""
        wide = self.codes.astype(jnp.float32) * self.scale[None, :]
        return wide.astype(self.dtype if dtype is None else dtype)


@jax.jit
def quantise(matrix: Float[Array, "k n"]) -> Int8:
    """Returns a matrix in eight bits: ``round(matrix / scale)``, ties to even.

    The scale of a column is its largest magnitude over 127. A column of zeros has the scale zero.
    """
    wide = matrix.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=0) / LARGEST
    codes = jnp.round(wide / jnp.where(scale > 0, scale, 1)[None, :])
    # The rounded scale of a column of subnormal numbers may be too small.
    return Int8(jnp.clip(codes, -LARGEST, LARGEST).astype(jnp.int8), scale, matrix.dtype)
