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

KERNEL_OBSTACLE = "the kernel reads no NF4"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "absmax", "nested_absmax", "offset"],
    meta_fields=["shape", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class Nf4:
    """``level(code) · absmax of the block``, computed in float32 and rounded once.

    The layout is bitsandbytes': the matrix is transposed to (n, k), flattened, and split into
    blocks of 64; the first of the two codes of a byte is in its upper half. If k is a multiple of
    64, the stored arrays have one row per column of the matrix. Otherwise blocks span columns: the
    arrays have one row, no partition divides them, and the last block may be shorter.

    Under double quantisation the absmax are 8-bit codes of bitsandbytes' signed dynamic type:
    ``level(code) · nested absmax + offset``, rounded after the product and after the sum.

    Attributes:
        codes: Two per byte.
        absmax: The largest magnitude of each block, or its code.
        nested_absmax: One per 256 consecutive blocks; None without double quantisation.
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
    def from_bitsandbytes(cls, codes, absmax, nested_absmax, offset, *, shape, dtype) -> "Nf4":
        """Returns the matrix of bitsandbytes' arrays."""
        k, n = shape
        rows = 1 if k % BLOCK else n
        absmax = jnp.asarray(absmax).reshape(rows, -1)
        nested = None if nested_absmax is None else jnp.asarray(nested_absmax)
        return cls(
            jnp.asarray(codes).reshape(rows, -1), absmax, nested, offset, shape, jnp.dtype(dtype)
        )

    @property
    def kernel_obstacle(self) -> str:
        """Why the fused kernel cannot read it, as the end of a sentence."""
        return KERNEL_OBSTACLE

    def scales(self) -> Float[Array, "rows blocks"]:
        """Returns the float32 absmax of every block."""
        if self.nested_absmax is None or self.offset is None:
            return self.absmax
        groups = jnp.repeat(self.nested_absmax, NESTED_BLOCK)[: self.absmax.size]
        product = _look_up(nested_levels(), self.absmax) * groups.reshape(self.absmax.shape)
        # Otherwise the compiler may contract both into a fused multiply-add, which rounds once.
        return lax.optimization_barrier(product) + self.offset

    def dense(self, dtype: DTypeLike | None = None) -> Float[Array, "k n"]:
        """Returns the dense matrix, the value of the stored arrays. None is its own dtype."""
        k, n = self.shape
        wanted = jnp.dtype(self.dtype if dtype is None else dtype)
        make = _in_kernel if self._has_kernel(wanted) else _in_xla
        return make(self.codes, self.scales(), wanted).reshape(-1)[: n * k].reshape(n, k).T

    def _has_kernel(self, dtype: jnp.dtype) -> bool:
        """Says whether the kernel dequantises it: on a Hopper GPU, to 16 bits, in whole tiles.

        Under a mesh XLA does: it may divide the arrays over devices, and cannot divide a kernel.
        """
        whole = self.shape[0] % BLOCK == 0 and self.absmax.size % BLOCK == 0
        divided = axis_sizes(tuple(jax.sharding.get_abstract_mesh().shape))
        narrow = dtype in (jnp.bfloat16, jnp.float16)
        return bool(whole and self.absmax.size and narrow and not divided and runs_kernels())


def _in_kernel(codes, scales, dtype):
    from lorax_kernels.weights.nf4.kernel import dequantise

    return dequantise(codes, scales, dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _in_xla(codes, scales, dtype):
    rows, blocks = scales.shape
    codes = jnp.pad(codes, ((0, 0), (0, blocks * BLOCK // 2 - codes.shape[1])))
    # One look-up per byte gives both levels.
    pairs = _look_up([(high, low) for high in LEVELS for low in LEVELS], codes)
    return (pairs.reshape(rows, blocks, BLOCK) * scales[:, :, None]).astype(dtype)


def _look_up(table, codes: UInt8[Array, "*shape"]) -> jax.Array:
    """Returns the entry of a table of 256 for each code."""
    entries = jnp.asarray(table, jnp.float32)
    return entries.at[codes.astype(jnp.uint32)].get(mode="promise_in_bounds")
