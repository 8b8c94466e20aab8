"""The code of a single thread of the kernel, in Mosaic GPU's operations."""

import struct
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, nvvm, vector

from lorax_kernels.weights.nf4.levels import LEVELS

SHIFTS = (4, 0, 12, 8, 20, 16, 28, 24)
"""The first bit of each code of a word, in the codes' order: the word is little-endian."""

# A shuffle within each half of a warp: four bits of the operand are the source thread.
_IN_HALVES = 0x101F


def lane_values(
    how: str, result: plgpu.ShapeDtypeStruct, ctx: Any, codes: Any, scales: Any, levels: Any
) -> Any:
    """Returns the values of some lines; a body of `inline_mgpu`.

    Args:
        how: The look-up of the levels, ``shuffle`` or ``permute``.
        result: Shape, dtype and layout of the values: eight per thread and line.
        ctx: Not used.
        codes: Registers, a word per line.
        scales: A reference, (lines, blocks of a line).
        levels: A reference to the 16 levels.
    """
    del ctx
    i32 = ir.IntegerType.get_signless(32)
    lane = arith.remui(utils.thread_idx(), utils.c(utils.WARPGROUP_SIZE, i32))
    block = _index(arith.shrui(lane, utils.c(3, i32)))  # eight threads share a block
    own = None
    if how == "shuffle":
        own = memref.load(levels, [_index(arith.andi(lane, utils.c(15, i32)))])
    narrow = ir.VectorType.get((8,), utils.dtype_to_ir_type(result.dtype))
    registers = codes.registers.copy()
    for line, register in enumerate(codes.registers):
        word = utils.bitcast(register, i32)
        found = _permuted(word) if own is None else _shuffled(word, own)
        scale = memref.load(scales, [utils.c(line, ir.IndexType.get()), block])
        products = [arith.mulf(level, scale) for level in found]
        wide = vector.from_elements(ir.VectorType.get((8,), scale.type), products)
        registers[line] = arith.truncf(narrow, wide)
    layout: Any = result.layout
    return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=None)


def _index(value: ir.Value) -> ir.Value:
    return arith.index_castui(ir.IndexType.get(), value)


def _shuffled(word: ir.Value, own: ir.Value) -> list[ir.Value]:
    """Returns the levels of a word's codes, each from the thread that holds it in `own`."""
    i32 = word.type
    everyone = utils.c(0xFFFFFFFF, i32)
    return [
        nvvm.shfl_sync(
            everyone,
            own,
            arith.shrui(word, utils.c(shift, i32)),
            utils.c(_IN_HALVES, i32),
            nvvm.ShflKind.idx,
        )
        for shift in SHIFTS
    ]


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
