"""Dequantisation of NF4 to 16 bits: each thread converts words of eight codes to eight values.

A word holds eight neighbours of a row. A thread takes the words of `Variant.rows` rows that follow
each other, all of one block of 64 rows, so that it reads its eight scales once. Neighbouring
threads take neighbouring words, so that loads and stores are coalesced. The kernel is one pass over
memory; its speed depends on the number of instructions per value.

Each byte of a level is selected from registers that hold a table of 16 levels, by permutations.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from lorax_kernels.device import is_interpreted
from lorax_kernels.weights.nf4.lanes import EACH, write_values
from lorax_kernels.weights.nf4.levels import BLOCK, LEVELS, NESTED_BLOCK, nested_levels

THREADS = 128


@dataclasses.dataclass(frozen=True)
class Variant:
    """A variant of the kernel.

    Attributes:
        rows: Rows per thread; 128 / `rows` words at least lie side by side in a tile.
    """

    rows: int = 8


DEFAULT = Variant()


def has_tiles(n: int, variant: Variant = DEFAULT) -> bool:
    """Says whether tiles of the kernel fill the rows of a matrix of n columns."""
    return n % (EACH * THREADS * variant.rows // BLOCK) == 0


@functools.partial(jax.jit, static_argnames=("dtype", "_variant"))
def dequantise(
    codes: UInt8[Array, "k bytes"],
    absmax: Array,
    nested: tuple[Float[Array, " groups"], Float[Array, ""]] | None,
    dtype: jnp.dtype,
    _variant: Variant = DEFAULT,
) -> Float[Array, "k n"]:
    """Returns ``level(code) · absmax`` in bfloat16 or float16.

    Args:
        codes: Two per byte, neighbours of a row, the first in the upper half.
        absmax: (k / 64, n), float32, or codes of eight bits with `nested`.
        nested: ``absmax = level(code) · nested absmax + offset``: one nested absmax per 256 blocks,
            counted down the columns, and the offset.
        dtype: The result's dtype.
        _variant: For benchmarks.
    """
    k = codes.shape[0]
    n = 2 * codes.shape[1]
    words = lax.bitcast_convert_type(codes.reshape(k, n // EACH, EACH // 2), jnp.uint32)
    beside = THREADS
    while n // EACH % beside:
        beside //= 2
    tile = THREADS // beside * _variant.rows, beside
    tables: list[jax.Array] = []
    if nested is not None:
        tables = [jnp.asarray(nested_levels(), jnp.float32), nested[0], nested[1].reshape(1)]

    def nf4_dequantise(*refs):  # whose name is the kernel's
        _tile(*refs, tile=tile, rows=_variant.rows, doubled=nested is not None)

    kernel = plgpu.kernel(
        nf4_dequantise,
        out_type=jax.ShapeDtypeStruct((k, n), dtype),
        grid=(k // tile[0], n // EACH // beside),
        grid_names=("row", "column"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    return kernel(words, absmax, *tables)


def _tile(words_hbm, absmax_hbm, *refs, tile: tuple[int, int], rows: int, doubled: bool):
    """Dequantises a tile: rows of one block, and words."""
    *tables, out_hbm = refs
    first = lax.axis_index("row") * tile[0]
    word = lax.axis_index("column") * tile[1]
    block = first // BLOCK
    inside = pl.ds(first, tile[0])
    columns = pl.ds(word * EACH, tile[1] * EACH)
    words = words_hbm.at[inside, pl.ds(word, tile[1])]
    absmax = absmax_hbm.at[pl.ds(block, 1), columns]
    out = out_hbm.at[inside, columns]
    if is_interpreted():  # the interpreter has no instructions of single threads
        scales = _plain_scales(absmax[...], tables, block, word, absmax_hbm.shape, doubled)
        out[...] = _plain_values(words[...], scales, out_hbm.dtype)
        return
    blocks = absmax_hbm.shape[0]
    write = functools.partial(write_values, tile=tile, rows=rows, blocks=blocks)
    kinds: list[Any] = [plgpu.RefType()] * (3 + len(tables))
    operands = [words, absmax, out, *tables]
    if doubled:
        # The number of the tile's first block, counted down the columns.
        number = word * EACH * blocks + block
        operands.append(lax.broadcast_in_dim(number, (THREADS,), ()))
        kinds.append(plgpu.Layout.WG_SPLAT((THREADS,)))
    plgpu.inline_mgpu(arg_types=tuple(kinds))(write)(*operands)


def _plain_scales(absmax, tables: list[Any], block, word, shape: tuple[int, int], doubled: bool):
    """Returns the scales (1, columns) of a tile."""
    if not doubled:
        return absmax
    levels, nested, offset = (table[...] for table in tables)
    column = word * EACH + lax.broadcasted_iota(jnp.int32, absmax.shape, 1)
    group = (column * shape[0] + block) // NESTED_BLOCK
    product = levels[absmax.astype(jnp.int32)] * nested[group]
    return lax.optimization_barrier(product) + offset[0]


def _plain_values(words, scales, dtype):
    """Returns the values of a tile."""
    shape = *words.shape, EACH
    place = lax.broadcasted_iota(jnp.uint32, shape, 2)
    shift = 4 * (place ^ 1)  # a byte's first code is in its upper half
    code = lax.broadcast_in_dim(words, shape, (0, 1)) >> shift & 15
    found = [jnp.float32(level) for level in LEVELS]
    for bit in range(4):
        odd = (code >> bit & 1) != 0
        pairs = zip(found[0::2], found[1::2], strict=True)
        found = [jnp.where(odd, high, low) for low, high in pairs]
    values = found[0].reshape(words.shape[0], -1)
    return (values * scales).astype(dtype)
