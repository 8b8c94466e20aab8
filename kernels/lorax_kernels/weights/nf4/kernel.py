"""Dequantisation of NF4 to 16 bits: each thread converts a word of eight codes to eight values.

A *line* is the work of a warpgroup with one word per thread: 512 bytes of codes in their stored
order, 16 blocks, 1024 consecutive elements of the flat matrix. A thread's eight values are 16
consecutive bytes, so that loads and stores are coalesced. The kernel is one pass over memory; its
speed depends on the number of instructions per value.

With `permute` each byte of a level is selected from registers that hold a table of 16 levels. With
`shuffle` it comes from another thread: each half of a warp holds the 16 levels, one per thread, and
a shuffle takes the code as the index of the source thread. `permute` with 4 lines per CTA was the
fastest on an H200: 45.8 µs for 14336 × 4096, 3.28 TB/s (`docs/measurements/nf4_h200.jsonl`).
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from lorax_kernels.device import is_interpreted
from lorax_kernels.weights.nf4.lanes import lane_values
from lorax_kernels.weights.nf4.levels import BLOCK, LEVELS

# A dimension of a copy to or from shared memory has at most 256 elements.
CODES = (2, 256)  # bytes of a line
VALUES = (4, 256)  # elements of a line
BLOCKS = 16  # of a line


@dataclasses.dataclass(frozen=True)
class Variant:
    """A variant of the kernel.

    Attributes:
        levels: The look-up: ``shuffle`` between threads, or ``permute`` of bytes in registers.
        lines: Lines per CTA, a power of two.
        staged: Whether loads and stores go through shared memory, in one copy per CTA and array.
    """

    levels: Literal["shuffle", "permute"] = "permute"
    lines: int = 4
    staged: bool = False


DEFAULT = Variant()


@functools.partial(jax.jit, static_argnames=("dtype", "_variant"))
def dequantise(
    codes: UInt8[Array, "rows bytes"],
    scales: Float[Array, "rows blocks"],
    dtype: jnp.dtype,
    _variant: Variant = DEFAULT,
) -> jax.Array:
    """Returns ``level(code) · scale`` in bfloat16 or float16, flat.

    Args:
        codes: Two per byte, the first in the upper half.
        scales: One float32 per 64 elements; their number must be a multiple of 64.
        dtype: The result's dtype.
        _variant: For benchmarks.
    """
    lines = scales.size // BLOCKS
    lines_each = min(_variant.lines, lines & -lines)
    body = functools.partial(_staged if _variant.staged else _direct, _variant, lines_each)
    kernel = plgpu.kernel(
        _named(body),
        out_type=jax.ShapeDtypeStruct((lines, *VALUES), dtype),
        grid=(lines // lines_each,),
        grid_names=("block",),
        scratch_types=_memory(lines_each, dtype) if _variant.staged else {},
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    operands = codes.reshape(lines, *CODES), scales.reshape(lines, BLOCKS)
    return kernel(*operands, jnp.asarray(LEVELS, jnp.float32)).reshape(-1)


def _named(body):
    def nf4_dequantise(*refs, **scratch):
        body(*refs, **scratch)

    return nf4_dequantise


def _memory(lines: int, dtype: jnp.dtype) -> dict[str, Any]:
    return {
        "codes": plgpu.SMEM((lines, *CODES), jnp.uint8),
        "scales": plgpu.SMEM((lines, BLOCKS), jnp.float32),
        "values": plgpu.SMEM((lines, *VALUES), dtype),
        "full": plgpu.Barrier(num_arrivals=2),
    }


def _direct(variant: Variant, lines: int, codes_hbm, scales_hbm, levels_hbm, out_hbm):
    at = pl.ds(lax.axis_index("block") * lines, lines)
    codes = plgpu.load(codes_hbm.at[at], layout=_layout((lines, *CODES), 4))
    out_hbm[at] = _values(variant, codes, scales_hbm.at[at], levels_hbm, out_hbm.dtype)


def _staged(
    variant: Variant,
    lines: int,
    codes_hbm,
    scales_hbm,
    levels_hbm,
    out_hbm,
    *,
    codes,
    scales,
    values,
    full,
):
    at = pl.ds(lax.axis_index("block") * lines, lines)
    plgpu.copy_gmem_to_smem(codes_hbm.at[at], codes, full)
    plgpu.copy_gmem_to_smem(scales_hbm.at[at], scales, full)
    plgpu.barrier_wait(full)
    loaded = plgpu.load(codes, layout=_layout(codes.shape, 4))
    values[...] = _values(variant, loaded, scales, levels_hbm, values.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(values, out_hbm.at[at])
    plgpu.wait_smem_to_gmem(0)


def _layout(shape: tuple[int, ...], each: int):
    """Returns the layout in which each thread holds `each` consecutive elements of every line."""
    return plgpu.Layout.WG_STRIDED(shape, vec_size=each)


def _values(variant: Variant, codes, scales, levels, dtype):
    """Returns the values of some lines."""
    if is_interpreted():  # the interpreter has no instructions of single threads
        return _plain_values(codes, scales[...], dtype)
    lines = codes.shape[0]
    shape = lines, *VALUES
    result = plgpu.ShapeDtypeStruct(shape, dtype, layout=_layout(shape, 8))
    function = functools.partial(lane_values, variant.levels, result)
    layouts = _layout(codes.shape, 4), plgpu.RefType(), plgpu.RefType()
    inline = plgpu.inline_mgpu(arg_types=layouts, return_type=result)
    return inline(function)(codes, scales, levels)


def _plain_values(codes, scales, dtype):
    lines = codes.shape[0]
    shape = *codes.shape, 2
    upper = lax.broadcasted_iota(jnp.uint32, shape, 3) == 0
    byte = lax.broadcast_in_dim(codes.astype(jnp.uint32), shape, (0, 1, 2))
    code = jnp.where(upper, byte >> 4, byte & 15)
    found = [jnp.float32(level) for level in LEVELS]
    for bit in range(4):
        odd = (code >> bit & 1) != 0
        pairs = zip(found[0::2], found[1::2], strict=True)
        found = [jnp.where(odd, high, low) for low, high in pairs]
    scale = lax.broadcast_in_dim(scales, (lines, BLOCKS, BLOCK), (0, 1))
    return (found[0].reshape(scale.shape) * scale).astype(dtype).reshape(lines, *VALUES)
