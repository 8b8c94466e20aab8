"""The two orders of NF4's arrays: that of bitsandbytes' files, and that of the matrix.

A file holds the transposed matrix (n, k), flattened: a byte's two codes are neighbours in a column
of the matrix. A kernel that multiplies by the matrix reads it row by row, so there a byte's two
codes are neighbours in a row.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8

from lorax_kernels.weights.nf4.levels import BLOCK


def keeps_matrix_order(shape: tuple[int, int]) -> bool:
    """Says whether the arrays of a matrix (k, n) have its order: blocks and pairs fit it."""
    k, n = shape
    return k % BLOCK == 0 and n % 2 == 0


def obstacle(shape: tuple[int, int]) -> str | None:
    """Returns why the fused kernel cannot read a matrix (k, n), or None: it reads the dense one."""
    if keeps_matrix_order(shape):
        return None
    return f"a matrix of {shape[0]} × {shape[1]} has NF4 blocks that span columns"


def in_matrix_order(
    codes: UInt8[Array, " bytes"], absmax: Array, shape: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Returns codes and absmax in the order of the matrix, from those of a file.

    Arrays of other shapes than `keeps_matrix_order` names get one row.
    """
    if not keeps_matrix_order(shape):
        return codes.reshape(1, -1), absmax.reshape(1, -1)
    k, n = shape
    return _packed(_unpacked(codes.reshape(n, k // 2)).T), absmax.reshape(n, k // BLOCK).T


def in_files_order(
    codes: UInt8[Array, "rows bytes"], absmax: Array, shape: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Returns codes and absmax as a file has them, flat: the inverse of `in_matrix_order`."""
    if keeps_matrix_order(shape):
        codes = _packed(_unpacked(codes).T)
        absmax = absmax.T
    return codes.reshape(-1), absmax.reshape(-1)


def _unpacked(codes: UInt8[Array, "rows bytes"]) -> UInt8[Array, "rows elements"]:
    return jnp.stack([codes >> 4, codes & 15], axis=-1).reshape(codes.shape[0], -1)


def _packed(codes: UInt8[Array, "rows elements"]) -> UInt8[Array, "rows bytes"]:
    return codes[:, 0::2] << 4 | codes[:, 1::2]
