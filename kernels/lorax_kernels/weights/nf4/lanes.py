"""The code of a single thread of the kernel, in Mosaic GPU's operations."""

import struct
from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

from lorax_kernels.weights.nf4.levels import LEVELS, NESTED_BLOCK

EACH = 8
"""Codes of a word."""

SHIFTS = (4, 0, 12, 8, 20, 16, 28, 24)
"""The first bit of each code of a word, in the codes' order: the word is little-endian."""


def write_values(
    ctx: Any,
    words: Any,
    absmax: Any,
    out: Any,
    *tables: Any,
    tile: tuple[int, int],
    rows: int,
    blocks: int,
) -> None:
    """Writes the values of a tile; a body of `inline_mgpu`.

    Args:
        ctx: Not used.
        words: A reference to the tile's words, (rows, words).
        absmax: A reference to the scales of its columns or their codes, (1, columns).
        out: A reference to its values, (rows, columns).
        *tables: With codes: the 256 levels of scales, nested absmax, the offset, and registers
            with the number of the tile's first block, counted down the columns.
        tile: Rows and words of the tile.
        rows: Rows of a thread.
        blocks: Blocks of a column.
    """
    del ctx
    i32 = ir.IntegerType.get_signless(32)
    lane = arith.remui(utils.thread_idx(), utils.c(utils.WARPGROUP_SIZE, i32))
    beside = utils.c(tile[1], i32)
    word = arith.remui(lane, beside)
    first = arith.muli(arith.divui(lane, beside), utils.c(rows, i32))
    column = arith.muli(word, utils.c(EACH, i32))
    scales = _scales(absmax, column, tables, blocks)
    narrow = ir.VectorType.get((EACH,), ir.MemRefType(out.type).element_type)
    wide = ir.VectorType.get((EACH,), ir.F32Type.get())
    places = [_index(arith.addi(first, utils.c(row, i32))) for row in range(rows)]
    loaded = [memref.load(words, [place, _index(word)]) for place in places]
    for place, codes in zip(places, loaded, strict=True):
        levels = _permuted(codes)
        products = [arith.mulf(*pair) for pair in zip(levels, scales, strict=True)]
        values = arith.truncf(narrow, vector.from_elements(wide, products))
        vector.store(values, out, [place, _index(column)])


def _scales(absmax: Any, column: ir.Value, tables: Any, blocks: int) -> list[ir.Value]:
    """Returns the scales of eight columns."""
    zero = utils.c(0, ir.IndexType.get())
    element = ir.MemRefType(absmax.type).element_type
    loaded = vector.load(ir.VectorType.get((EACH,), element), absmax, [zero, _index(column)])
    found = [vector.extract(loaded, [], [place]) for place in range(EACH)]
    if not tables:
        return found
    i32 = ir.IntegerType.get_signless(32)
    levels, nested, offset, begin = tables
    (start,) = begin.registers.flat
    mean = memref.load(offset, [zero])
    scales = []
    for place, code in enumerate(found):
        level = memref.load(levels, [_index(arith.extui(i32, code))])
        at = arith.addi(column, utils.c(place, i32))
        number = arith.addi(start, arith.muli(at, utils.c(blocks, i32)))
        group = arith.divui(number, utils.c(NESTED_BLOCK, i32))
        product = _rounded("mul", level, memref.load(nested, [_index(group)]))
        scales.append(_rounded("add", product, mean))
    return scales


def _rounded(operation: str, a: ir.Value, b: ir.Value) -> ir.Value:
    """Returns a rounded product or sum, which no compiler contracts into a fused multiply-add."""
    text = f"{operation}.rn.f32 $0, $1, $2;"
    return llvm.inline_asm(a.type, [a, b], text, "=f,f,f")


def _index(value: ir.Value) -> ir.Value:
    return arith.index_castui(ir.IndexType.get(), value)


def _permuted(word: ir.Value) -> list[ir.Value]:
    """Returns the levels of a word's codes by byte permutations."""
    i32 = word.type
    struct_type = ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>")
    by_bits = {}
    for first in (0, 16):
        four = llvm.inline_asm(struct_type, [word], four_levels(first), "=r,=r,=r,=r,r")
        for place in range(4):
            at = ir.DenseI64ArrayAttr.get([place])
            level = arith.bitcast(ir.F32Type.get(), llvm.extractvalue(i32, four, at))
            by_bits[first + 4 * place] = level
    return [by_bits[shift] for shift in SHIFTS]


def four_levels(first: int) -> str:
    """Returns PTX: the levels of the four codes of $4 from bit `first` on, 0 or 16, as $0 … $3.

    A permutation selects four of eight bytes, by three bits each. For each byte of a float32 it
    selects from the lower eight levels and from the upper eight; the codes' fourth bits then select
    one of the two. At the end, the bytes are transposed into four words.
    """
    lines = [
        ".reg .b32 word, low, high, upper, other, b0, b1, b2, b3;",
        f"shr.b32 word, $4, {first};",
        "and.b32 low, word, 0x7777;",
        "shr.b32 high, word, 1;",
        "lop3.b32 high, high, 0x4444, 0x3210, 0xea;",  # (high & 0x4444) | 0x3210
    ]
    for place in range(4):
        a, b, c, d = (_bytes(place, first_level) for first_level in (0, 4, 8, 12))
        lines += [
            f"mov.b32 upper, {a}; mov.b32 other, {b}; prmt.b32 b{place}, upper, other, low;",
            f"mov.b32 upper, {c}; mov.b32 other, {d}; prmt.b32 upper, upper, other, low;",
            f"prmt.b32 b{place}, b{place}, upper, high;",
        ]
    lines += [
        "prmt.b32 upper, b0, b1, 0x5140; prmt.b32 other, b2, b3, 0x5140;",
        "prmt.b32 $0, upper, other, 0x5410; prmt.b32 $1, upper, other, 0x7632;",
        "prmt.b32 upper, b0, b1, 0x7362; prmt.b32 other, b2, b3, 0x7362;",
        "prmt.b32 $2, upper, other, 0x5410; prmt.b32 $3, upper, other, 0x7632;",
    ]
    return "{ " + " ".join(lines) + " }"


def _bytes(place: int, first_level: int) -> int:
    """Returns one byte of each of four levels, as a word."""
    levels = LEVELS[first_level : first_level + 4]
    return int.from_bytes(bytes(struct.pack("<f", level)[place] for level in levels), "little")
