"""A frozen matrix in NF4, and its dequantisation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from lorax_kernels.device import runs_kernels
from lorax_kernels.dispatch import axis_sizes
from lorax_kernels.weights.nf4.levels import BLOCK, LEVELS, NESTED_BLOCK, nested_levels
from lorax_kernels.weights.nf4.order import (
    in_files_order,
    in_matrix_order,
    keeps_matrix_order,
    obstacle,
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "absmax", "nested_absmax", "offset"],
    meta_fields=["shape", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class Nf4:
    """``level(code) · absmax of the block``, computed in float32 and rounded once.

    A block is 64 consecutive elements of a column. If k is a multiple of 64 and n even, the arrays
    have the order of the matrix: codes (k, n/2), of which a byte holds two neighbours of a row, the
    first in its upper half; absmax (k/64, n). A partition of the matrix is then one of the arrays.
    Other shapes keep the order of bitsandbytes' files: the transposed matrix, flattened, in blocks
    of 64 that may span columns; the arrays have one row, and the last block may be shorter.

    Under double quantisation the absmax are 8-bit codes of bitsandbytes' signed dynamic type:
    ``level(code) · nested absmax + offset``, rounded after the product and after the sum.

    Attributes:
        codes: Two per byte.
        absmax: The largest magnitude of each block, or its code.
        nested_absmax: One per 256 blocks that follow each other in the files' order; None without
            double quantisation.
        offset: The mean of all absmax; None without double quantisation.
        shape: The matrix's shape, (k, n).
        dtype: The dtype of its matmuls.

    Source: Dettmers et al. 2023, "QLoRA", eq. 1, 3 and 6, https://arxiv.org/abs/2305.14314
    """

    codes: UInt8[Array, "rows bytes"]
    absmax: Float[Array, "rows blocks"] | UInt8[Array, "rows blocks"]
    nested_absmax: Float[Array, " groups"] | None
    offset: Float[Array, ""] | None
    shape: tuple[int, int]
    dtype: DTypeLike

    @classmethod
    def from_bitsandbytes(
        cls,
        codes: UInt8[Array, " bytes"],
        absmax: Array,
        nested_absmax: Float[Array, " groups"] | None,
        offset: Float[Array, ""] | None,
        *,
        shape: tuple[int, int],
        dtype: DTypeLike,
    ) -> "Nf4":
        """Returns the matrix of the flat arrays of a file.

        Args:
            codes: Two per byte, of the transposed matrix.
            absmax: Per block, or its code.
            nested_absmax: As the attribute.
            offset: As the attribute.
            shape: The matrix's, (k, n): the transpose of the file's.
            dtype: The dtype of its matmuls.
        """
        dtype = jnp.dtype(dtype)
        return _from_files(codes, absmax, nested_absmax, offset, shape=tuple(shape), dtype=dtype)

    def to_bitsandbytes(self) -> tuple[Array, Array, Array | None, Array | None]:
        """Returns the flat arrays of a file: codes, absmax, nested absmax and offset."""
        codes, absmax = in_files_order(self.codes, self.absmax, self.shape)
        return codes, absmax, self.nested_absmax, self.offset

    @property
    def kernel_obstacle(self) -> str | None:
        """Why the fused kernel cannot read it, as the end of a sentence; None if it can."""
        return obstacle(self.shape)

    def scales(self) -> Float[Array, "rows blocks"]:
        """Returns the float32 absmax of every block."""
        if self.nested_absmax is None or self.offset is None:
            return self.absmax
        groups = jnp.repeat(self.nested_absmax, NESTED_BLOCK)[: self.absmax.size]
        if keeps_matrix_order(self.shape):
            groups = groups.reshape(self.absmax.shape[::-1]).T
        product = _look_up(nested_levels(), self.absmax) * groups.reshape(self.absmax.shape)
        # Otherwise the compiler may contract both into a fused multiply-add, which rounds once.
        return lax.optimization_barrier(product) + self.offset

    def dense(self, dtype: DTypeLike | None = None) -> Float[Array, "k n"]:
        """Returns the dense matrix, the value of the stored arrays. None is its own dtype."""
        wanted = jnp.dtype(self.dtype if dtype is None else dtype)
        if self._has_kernel(wanted):
            return _in_kernel(self, wanted)
        if keeps_matrix_order(self.shape):
            return _in_xla(self.codes, self.scales(), wanted)
        k, n = self.shape
        return _in_blocks(self.codes, self.scales(), wanted).reshape(-1)[: n * k].reshape(n, k).T

    def _has_kernel(self, dtype: jnp.dtype) -> bool:
        """Says whether the kernel dequantises it: on a Hopper GPU, to 16 bits, in whole tiles.

        Under a mesh XLA does: it may divide the arrays over devices, and cannot divide a kernel.
        """
        divided = axis_sizes(tuple(jax.sharding.get_abstract_mesh().shape))
        narrow = dtype in (jnp.bfloat16, jnp.float16)
        if not keeps_matrix_order(self.shape) or divided or not narrow or not runs_kernels():
            return False
        from lorax_kernels.weights.nf4.kernel import has_tiles

        return has_tiles(self.shape[1])


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _from_files(codes, absmax, nested_absmax, offset, *, shape, dtype) -> Nf4:
    codes, absmax = in_matrix_order(jnp.asarray(codes), jnp.asarray(absmax), shape)
    return Nf4(codes, absmax, nested_absmax, offset, shape, dtype)


def _in_kernel(matrix: Nf4, dtype: jnp.dtype):
    from lorax_kernels.weights.nf4.kernel import dequantise

    nested = None
    if matrix.nested_absmax is not None and matrix.offset is not None:
        nested = (matrix.nested_absmax, matrix.offset)
    return dequantise(matrix.codes, matrix.absmax, nested, dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _in_xla(codes, scales, dtype):
    """Returns the matrix of arrays in its order."""
    blocks, n = scales.shape
    pairs = _look_up([(high, low) for high in LEVELS for low in LEVELS], codes)
    levels = pairs.reshape(blocks, BLOCK, n)
    return (levels * scales[:, None, :]).astype(dtype).reshape(-1, n)


@functools.partial(jax.jit, static_argnames="dtype")
def _in_blocks(codes, scales, dtype):
    """Returns the blocks of arrays in the files' order."""
    rows, blocks = scales.shape
    codes = jnp.pad(codes, ((0, 0), (0, blocks * BLOCK // 2 - codes.shape[1])))
    # One look-up per byte gives both levels.
    pairs = _look_up([(high, low) for high in LEVELS for low in LEVELS], codes)
    return (pairs.reshape(rows, blocks, BLOCK) * scales[:, :, None]).astype(dtype)


def _look_up(table, codes: UInt8[Array, "*shape"]) -> jax.Array:
    """Returns the entry of a table of 256 for each code."""
    entries = jnp.asarray(table, jnp.float32)
    return entries.at[codes.astype(jnp.uint32)].get(mode="promise_in_bounds")
