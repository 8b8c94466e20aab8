"""The arguments of `grouped_matmul`, and the plan of its kernel."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from lorax_kernels.lora_linear.warpgroups import REGISTERS

RANK = 16  # of an update that fits one short step
STEP = 64  # contraction per ring slot: 64 elements of 2 bytes are one 128-byte swizzled row
SHARED_MEMORY_BYTES = 227 * 1024  # per block on sm_90, less a little for barriers below

type Epilogue = Literal["store", "add", "swiglu", "swiglu_keep", "swiglu_grad", "swiglu_back"]
EPILOGUE_ARRAYS = {
    "store": (0, 1),
    "add": (1, 1),
    "swiglu": (0, 1),
    "swiglu_keep": (0, 3),
    "swiglu_grad": (1, 2),
    "swiglu_back": (2, 3),
}
"""Arrays of a group's shape that an epilogue reads, and writes."""


@dataclasses.dataclass(frozen=True)
class MatmulConfig:
    """The tiling of the matmul.

    Attributes:
        block_m: Rows of an output tile; the two multiplying warpgroups take half each.
        block_n: Columns of an output tile.
        stages: Slots of the ring.
        cluster: CTAs of consecutive row tiles that share the right operand's copies.
        raster_minor: Dimension in which neighbouring tiles follow each other, 0 rows, 1 columns.
        raster_width: Tiles in that dimension before the other one advances.
        store_n: Columns that are staged at a time on the way out.
        store_slots: Staging buffers per warpgroup.
    """

    block_m: int = 128
    block_n: int = 256
    stages: int = 4
    cluster: int = 1
    raster_minor: int = 1
    raster_width: int = 8
    store_n: int = 64
    store_slots: int = 2

    def shared_memory_bytes(self) -> int:
        """Returns the bytes of the ring and the staging buffers."""
        ring = self.stages * STEP * (self.block_m + self.block_n) * 2
        return ring + 2 * self.store_slots * 64 * self.store_n * 2


def fits(config: MatmulConfig, *, short: bool) -> bool:
    """Says whether a matmul fits shared memory, with a short step or without."""
    step = 2 * RANK * (config.block_m + config.block_n) if short else 0
    return config.shared_memory_bytes() + step <= SHARED_MEMORY_BYTES - 1024


def with_short_step(config: MatmulConfig) -> MatmulConfig:
    """Returns `config`, with a slot less where a short step would not fit."""
    return config if fits(config, short=True) else dataclasses.replace(config, stages=3)


class Term(NamedTuple):
    """``lhs[:, column:]·rhs[row:, columns:]``; several `rhs` share the left operand.

    Attributes:
        lhs: (m, ≥ k); columns beyond the array count as zero.
        rhs: One matrix, or gate and up: each (k, n), or (n, k) when the matmul is transposed.
        k: Length of the contraction; 0 is all of `rhs`.
        column: Where the term's columns begin in `lhs`, a multiple of 64.
        row: Where they begin in the rows of `rhs`, not transposed.
        columns: Where the group's columns begin in each `rhs`, not transposed.
    """

    lhs: jax.Array
    rhs: tuple[jax.Array, ...]
    k: int = 0
    column: int = 0
    row: int = 0
    columns: tuple[int, ...] = (0, 0)


class Update(NamedTuple):
    """A low-rank update of rank 16, ``lhs·rhs``, for all groups: one short step at the end.

    Attributes:
        lhs: (m, 16).
        rhs: (16, all groups' columns side by side), for a transposed matmul too.
    """

    lhs: jax.Array
    rhs: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout of the update of a transposed matmul: ``mask ∘ (lhs·rhs) / keep``.

    Attributes:
        seed: Two words of the key, and the number of the array's first row.
        rate: Probability of zeroing an element.
    """

    seed: jax.Array
    rate: float = dataclasses.field(metadata={"static": True})


class PlacedTerm(NamedTuple):
    """A `Term` whose operands are numbers of kernel arguments."""

    lhs: int
    rhs: tuple[int, ...]
    k: int
    column: int = 0
    row: int = 0
    columns: tuple[int, ...] = (0, 0)


def place(arrays: list[jax.Array], array: jax.Array) -> int:
    """Returns the number of `array` among the kernel's arguments, and appends it if it is new."""
    for index, known in enumerate(arrays):
        if known is array:
            return index
    arrays.append(array)
    return len(arrays) - 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """The kernel's plan: sizes, and the index of each operand in `refs`."""

    config: MatmulConfig
    epilogue: Epilogue
    transposed: bool
    rate: float
    m: int
    columns: tuple[int, ...]  # per group
    terms: tuple[tuple[PlacedTerm, ...], ...]
    masked_steps: int  # ring steps of the dropped term, multiplied in the epilogue
    seed: int | None
    bias: int | None
    tail: tuple[int, ...]  # of the result's shape, carried by the last steps; negative: results
    outputs: int
    update: tuple[int, int] | None = None  # lhs and rhs of a short step
    skipped: int = 0  # column tiles of the first group that are there already
    factors: tuple[int, ...] = ()  # for all groups, or for gate and for up
    keep: bool = False  # whether each group's product before its factor is a result too

    @property
    def halves(self) -> int:
        """Right operands that share a left one: two where gate and up are computed together."""
        return len(self.terms[0][0].rhs)

    @property
    def tile_n(self) -> int:
        """Columns of each output that a tile covers."""
        return self.config.block_n // self.halves

    @property
    def name(self) -> str:
        """The kernel's name in profiles."""
        return f"lora_matmul_{'nt' if self.transposed else 'nn'}_{self.epilogue}"

    @property
    def copies(self) -> int:
        """Copies that fill a slot of the ring."""
        return 1 + self.halves

    @property
    def registers(self) -> tuple[int, int]:
        """Per thread of the multiplying and the feeding warpgroups."""
        return (240, 24) if self.tail else REGISTERS

    @property
    def warpgroup_m(self) -> int:
        """Rows of a tile that each multiplying warpgroup takes."""
        return self.config.block_m // 2

    @property
    def tail_steps(self) -> int:
        """Ring steps that carry the tail: each the columns that one step of the store needs."""
        return self.tile_n // STEP if self.tail else 0

    @property
    def writes(self) -> int:
        """Results of each group."""
        return EPILOGUE_ARRAYS[self.epilogue][1] + self.keep

    @property
    def staging_slots(self) -> int:
        """Staging buffers in use: a divisor of a tile's pieces, so that they rotate evenly."""
        pieces = self.warpgroup_m // 64 * self.tile_n // self.config.store_n * self.writes
        return max(s for s in range(1, self.config.store_slots + 1) if pieces % s == 0)

    @property
    def tiles(self) -> tuple[int, int]:
        """Rows (a multiple of the cluster) and columns of tiles to compute."""
        c = self.config
        rows = -(-self.m // (c.block_m * c.cluster)) * c.cluster
        return rows, sum(-(-n // self.tile_n) for n in self.columns) - self.skipped

    @property
    def first_tiles(self) -> tuple[int, ...]:
        """Column tile with which each group begins."""
        counts = [-(-n // self.tile_n) for n in self.columns]
        return tuple(sum(counts[:g]) for g in range(len(counts)))

    def steps(self, group: int) -> int:
        """Ring steps that are multiplied into the accumulator in the main loop."""
        total = sum(-(-term.k // STEP) for term in self.terms[group])
        return total - self.masked_steps

    def select(self, tile, values: Sequence[int]):
        """Returns the value of column tile `tile`'s group."""
        chosen = jnp.int32(values[0])
        for first, value in zip(self.first_tiles[1:], values[1:], strict=True):
            chosen = jnp.where(tile >= first, jnp.int32(value), chosen)
        return chosen

    def for_each_group(self, tile, body: Callable[[int], None]) -> None:
        """Runs ``body(group)`` for column tile `tile`'s group."""
        firsts = (*self.first_tiles, self.tiles[1] + self.skipped)
        for group in range(len(self.columns)):
            if len(self.columns) == 1:
                body(group)
            else:
                inside = (tile >= firsts[group]) & (tile < firsts[group + 1])
                pl.when(inside)(functools.partial(body, group))
