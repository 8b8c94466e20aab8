"""The matrix product behind `lora_linear` on Hopper, in Pallas's Mosaic GPU.

One persistent kernel computes, for every group g of output columns,

    y_g = Σ_t lhs_t · rhs_t        (bf16 or fp16 operands, float32 sums, one rounding)

The terms of a group run one after another through the same ring of shared memory, as more steps of
one contraction. So ``x·W0 + h·B`` is one product that is r columns longer, the members of a group
share one launch, and the backward pass ``Σ_g dy_g·W_gᵀ + g·Aᵀ`` is one product too. Ragged edges
cost nothing: the copy engine reads zeros outside an array and drops what would be written there.

Per CTA: two warpgroups multiply, one feeds the ring. The ring's counter runs on across output tiles,
so the next tile is being loaded while this one is being stored.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lorax_kernels.device import core_count
from lorax_kernels.lora_linear.dropout import keep_mask, keep_probability

STEP = 64  # contraction per ring slot: 64 elements of 2 bytes are one 128-byte swizzled row
SHARED_MEMORY_BYTES = 227 * 1024  # per block on sm_90, less a little for barriers below

type Epilogue = Literal["store", "swiglu", "swiglu_keep", "swiglu_grad"]


@dataclasses.dataclass(frozen=True)
class MatmulConfig:
    """How the product is cut.

    Attributes:
        block_m: Rows of an output tile; the two multiplying warpgroups take half each.
        block_n: Columns of an output tile.
        stages: Slots of the ring.
        cluster: CTAs below each other that share the right operand's copies.
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
        """Returns what the ring and the staging buffers need."""
        ring = self.stages * STEP * (self.block_m + self.block_n) * 2
        return ring + 2 * self.store_slots * 64 * self.store_n * 2


class Term(NamedTuple):
    """``lhs[:, column : column + k] · rhs``; several `rhs` share the left operand.

    Attributes:
        lhs: (m, ≥ k); columns beyond the array count as zero.
        rhs: One matrix, or gate and up: each (k, n), or (n, k) when the product is transposed.
        column: Where the term's columns begin in `lhs`.
    """

    lhs: jax.Array
    rhs: tuple[jax.Array, ...]
    column: int = 0


class Dropout(NamedTuple):
    """Dropout of the last term of a transposed product: ``mask ∘ (lhs·rhsᵀ) / keep``.

    Attributes:
        seed: Two words of the key, and the number of the array's first row.
        rate: Probability of zeroing an element.
    """

    seed: jax.Array
    rate: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the kernel knows before it runs: sizes, and where each operand stands in `refs`."""

    config: MatmulConfig
    epilogue: Epilogue
    transposed: bool
    rate: float
    m: int
    columns: tuple[int, ...]  # per group
    terms: tuple[tuple[tuple[int, tuple[int, ...], int, int], ...], ...]  # lhs, rhs, column, k
    masked_steps: int  # ring steps of the dropped term, multiplied in the epilogue
    seed: int | None
    bias: int | None
    tail: int | None  # d_act, carried by the ring's last steps
    outputs: int
    skipped: int = 0  # column tiles of the first group that are there already

    @property
    def halves(self) -> int:
        return len(self.terms[0][0][1])

    @property
    def tile_n(self) -> int:
        """Columns of each output that a tile covers."""
        return self.config.block_n // self.halves

    @property
    def name(self) -> str:
        return f"lora_matmul_{'nt' if self.transposed else 'nn'}_{self.epilogue}"

    @property
    def copies(self) -> int:
        """Copies that fill a slot of the ring."""
        return 1 + self.halves

    @property
    def registers(self) -> tuple[int, int]:
        """Per thread of the multiplying and the feeding warpgroups: 2·m + f fit 64 Ki registers."""
        return (240, 24) if self.epilogue == "swiglu_grad" else (232, 40)

    @property
    def warpgroup_m(self) -> int:
        return self.config.block_m // 2

    @property
    def tail_steps(self) -> int:
        return 0 if self.tail is None else self.tile_n // STEP

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
        total = sum(-(-term[3] // STEP) for term in self.terms[group])
        return total - self.masked_steps

    def select(self, tile, values: Sequence[int]):
        """Returns the value of the group that column tile `tile` belongs to."""
        chosen = jnp.int32(values[0])
        for first, value in zip(self.first_tiles[1:], values[1:], strict=True):
            chosen = jnp.where(tile >= first, jnp.int32(value), chosen)
        return chosen

    def for_each_group(self, tile, body: Callable[[int], None]) -> None:
        """Runs ``body(group)`` for the group that column tile `tile` belongs to."""
        firsts = (*self.first_tiles, self.tiles[1] + self.skipped)
        for group in range(len(self.columns)):
            if len(self.columns) == 1:
                body(group)
            else:
                inside = (tile >= firsts[group]) & (tile < firsts[group + 1])
                pl.when(inside)(functools.partial(body, group))


def grouped_matmul(
    groups: Sequence[Sequence[Term]],
    *,
    config: MatmulConfig,
    transposed: bool = False,
    epilogue: Epilogue = "store",
    bias: jax.Array | None = None,
    d_act: jax.Array | None = None,
    dropout: Dropout | None = None,
    begun: tuple[Any, int] | None = None,
    sms: int | None = None,
) -> list[jax.Array]:
    """Computes ``y_g = Σ_t lhs_t · rhs_t (+ bias_g)`` for every group in one launch.

    Args:
        groups: The terms of each output.
        config: How the product is cut.
        transposed: Whether each right operand is (n, k) and read as its transpose, in place.
        epilogue: ``store`` writes the sums. The others take gate and up as two right operands:
            ``swiglu`` writes ``silu(gate)·up``; ``swiglu_keep`` writes that, gate and up;
            ``swiglu_grad`` writes the gradients of gate and up for `d_act`.
        bias: One vector for all groups, each group's part padded to whole tiles.
        d_act: Gradient of the activation, (m, n), for ``swiglu_grad``.
        dropout: Drops the last term of a transposed product of one group.
        begun: A `jax.Ref` to the first group's result, and how many of its first columns are there
            already, in whole tiles; the rest is written into it.
        sms: CTAs to launch; None asks the device.

    Returns:
        One (m, n) array per group but one that was begun, or the epilogue's arrays.
    """
    arrays: list[jax.Array] = []

    def place(array: jax.Array) -> int:
        for index, known in enumerate(arrays):
            if known is array:
                return index
        arrays.append(array)
        return len(arrays) - 1

    contraction, free = (1, 0) if transposed else (0, 1)
    plan = Plan(
        config=config,
        epilogue=epilogue,
        transposed=transposed,
        rate=dropout.rate if dropout else 0.0,
        m=groups[0][0].lhs.shape[0],
        columns=tuple(terms[0].rhs[0].shape[free] for terms in groups),
        terms=tuple(
            tuple(
                (place(t.lhs), tuple(place(w) for w in t.rhs), t.column, t.rhs[0].shape[contraction])
                for t in terms
            )
            for terms in groups
        ),
        masked_steps=-(-groups[0][-1].rhs[0].shape[contraction] // STEP) if dropout else 0,
        seed=place(dropout.seed) if dropout else None,
        bias=None if bias is None else place(bias),
        tail=None if d_act is None else place(d_act),
        outputs={"store": len(groups), "swiglu": 1, "swiglu_keep": 3, "swiglu_grad": 2}[epilogue],
        skipped=begun[1] // config.block_n if begun else 0,
    )
    dtype = groups[0][0].lhs.dtype
    _check(plan, dtype)
    widths = plan.columns if epilogue == "store" else plan.columns * plan.outputs
    outputs = [jax.ShapeDtypeStruct((plan.m, n), dtype) for n in widths]
    if begun is None:
        return list(launch(_kernel, plan, dtype, outputs, sms)(*arrays))
    return list(launch(_kernel, plan, dtype, outputs[1:], sms)(*arrays, begun[0]))


def _check(plan: Plan, dtype) -> None:
    c = plan.config
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"the kernel takes bfloat16 and float16 operands, got {dtype}")
    if c.block_m not in (128, 256) or c.block_n % 64 or plan.tile_n % c.store_n:
        raise ValueError(f"{c} has no tile that the matrix units take")
    if c.shared_memory_bytes() > SHARED_MEMORY_BYTES - 1024:
        raise ValueError(f"{c} needs {c.shared_memory_bytes()} bytes of shared memory")
    if plan.masked_steps > c.stages:
        raise ValueError(f"rank over {c.stages * STEP} with dropout does not fit the ring")


def launch(kernel, plan: Plan, dtype, outputs, sms: int | None, **scratch):
    """Returns a function that runs a kernel of three warpgroups, with a ring and staging buffers.

    Args:
        kernel: ``kernel(plan, *refs, **scratch)``.
        plan: What it knows.
        dtype: Of the operands.
        outputs: Types of the results.
        sms: CTAs; None asks the device.
        **scratch: More shared memory and barriers.
    """
    c = plan.config
    sms = sms or core_count()
    rhs_tile = (plan.tile_n, STEP) if plan.transposed else (STEP, plan.tile_n)
    swizzled = functools.partial(swizzled_memory, dtype=dtype)
    empty: Any = plgpu.Barrier(num_arrivals=2, num_barriers=c.stages)
    if c.cluster > 1:
        # A slot is free when the warpgroups of every CTA that its copy writes to have read it.
        empty = plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=2, num_barriers=c.stages
        )
    body = functools.partial(kernel, plan)
    body.__name__ = plan.name  # type: ignore[attr-defined]  # the name in profiles
    return plgpu.kernel(
        body,
        out_type=outputs,
        grid=(sms // c.cluster,),
        grid_names=("sm",),
        cluster=(c.cluster,) if c.cluster > 1 else (),
        cluster_names=("cluster",) if c.cluster > 1 else (),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types={
            "lhs": swizzled((c.stages, c.block_m, STEP)),
            "rhs": swizzled((plan.halves, c.stages, *rhs_tile)),
            "staging": swizzled((2, c.store_slots, 64, c.store_n)),
            "full": plgpu.Barrier(num_arrivals=plan.copies, num_barriers=c.stages),
            "empty": empty,
            **scratch,
        },
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )


def swizzled_memory(shape: tuple[int, ...], dtype, minor: int | None = None) -> Any:
    """Returns shared memory for tiles in the layout that the matrix units and copies agree on.

    Args:
        shape: Of the memory.
        dtype: Of its elements.
        minor: Elements of a swizzled row, if not as many as `shape` allows.
    """
    bits = jnp.finfo(dtype).bits
    swizzle = plgpu.find_swizzle((minor or shape[-1]) * bits)
    tiling = plgpu.TilingTransform((8, swizzle * 8 // bits))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def _kernel(plan: Plan, *refs, **scratch) -> None:
    multiplying, feeding = plan.registers

    def feed():
        plgpu.set_max_registers(feeding, action="decrease")
        Feeder(plan, refs, **scratch).run()

    def multiply():
        plgpu.set_max_registers(multiplying, action="increase")
        Multiplier(plan, refs, **scratch).run()

    lax.cond(lax.axis_index("warpgroup") == 2, feed, multiply)


class Role:
    """A warpgroup's part: the operands, the ring, and the order of the tiles."""

    def __init__(self, plan: Plan, refs, *, lhs, rhs, staging, full, empty):
        self.plan, self.config = plan, plan.config
        self.inputs, self.outputs = refs[: -plan.outputs], refs[-plan.outputs :]
        self.lhs, self.rhs, self.staging, self.full, self.empty = lhs, rhs, staging, full, empty

    def for_each_tile(self, body):
        """Runs ``body(row tile, column tile, ring count) -> ring count`` for this CTA's tiles."""
        c, (rows, columns) = self.config, self.plan.tiles
        rows //= c.cluster

        @plgpu.nd_loop((rows * columns,), collective_axes="sm", init_carry=jnp.int32(0))
        def count(info, carry):
            row, column = plgpu.planar_snake(
                info.index[0], (rows, columns), c.raster_minor, c.raster_width
            )
            if c.cluster > 1:
                row = row * c.cluster + lax.axis_index("cluster")
            return body(row, column + self.plan.skipped, carry)

        return count

    def slot(self, count):
        return lax.rem(count, jnp.int32(self.config.stages))


class Feeder(Role):
    """Copies the operands into the ring."""

    def run(self) -> None:
        total = self.for_each_tile(self.feed_tile)
        left = jnp.minimum(total, self.config.stages)

        @pl.loop(0, left)
        def _drain(i):  # so that every barrier ends in a phase that somebody has seen
            plgpu.barrier_wait(self.empty.at[self.slot(total - left + i)])

    def feed_tile(self, row, column, count):
        plan = self.plan
        plan.for_each_group(column, functools.partial(self.feed_group, row, column, count))
        steps = [plan.steps(g) + plan.masked_steps for g in range(len(plan.columns))]
        count += plan.select(column, steps)
        if plan.tail is not None:
            first = plan.terms[0][0]
            for i in range(plan.tail_steps):
                at = column * plan.tile_n + i * STEP
                # The right operand is not used: it completes the slot's barrier.
                self.copy(count + i, row, self.inputs[plan.tail], at, first[1], 0, 0)
            count += plan.tail_steps
        return count

    def feed_group(self, row, column, count, group: int) -> None:
        plan = self.plan
        n0 = (column - plan.first_tiles[group]) * plan.tile_n
        for lhs, rhs, start, k in plan.terms[group]:
            steps = -(-k // STEP)

            @pl.loop(0, steps)
            def _step(s, count=count, lhs=lhs, rhs=rhs, start=start):
                k0 = s * STEP
                self.copy(count + s, row, self.inputs[lhs], start + k0, rhs, k0, n0)

            count += steps

    def copy(self, count, row, lhs, lhs_k0, rhs: tuple[int, ...], k0, n0) -> None:
        c, plan, slot = self.config, self.plan, self.slot(count)

        @pl.when(count >= c.stages)
        def _():
            plgpu.barrier_wait(self.empty.at[slot])

        rows, ks, ns = pl.ds(row * c.block_m, c.block_m), pl.ds(k0, STEP), pl.ds(n0, plan.tile_n)
        source = lhs.at[rows, pl.ds(lhs_k0, STEP)]
        plgpu.copy_gmem_to_smem(source, self.lhs.at[slot], self.full.at[slot])
        for half, index in enumerate(rhs):
            source = self.inputs[index]
            plgpu.copy_gmem_to_smem(
                source.at[ns, ks] if plan.transposed else source.at[ks, ns],
                self.rhs.at[half, slot],
                self.full.at[slot],
                collective_axes="cluster" if c.cluster > 1 else None,
            )


class Multiplier(Role):
    """Multiplies what the ring brings and stores the result."""

    def run(self) -> None:
        self.warpgroup = lax.axis_index("warpgroup")
        self.for_each_tile(self.multiply_tile)
        plgpu.wait_smem_to_gmem(0)

    def multiply_tile(self, row, column, count):
        plan = self.plan
        steps = plan.select(column, [plan.steps(g) for g in range(len(plan.columns))])
        shape = (plan.warpgroup_m, plan.tile_n)
        accumulators = [plgpu.ACC(shape, jnp.float32)] * plan.halves
        sums = pl.run_scoped(functools.partial(self.accumulate, count, steps), *accumulators)
        count += steps
        self.store(sums, row, column, count)
        held = plan.masked_steps + plan.tail_steps
        for i in range(held):
            plgpu.barrier_arrive(self.empty.at[self.slot(count + i)])
        return count + held

    def accumulate(self, count, steps, *accumulators):
        halves = self.plan.halves

        @pl.loop(0, steps)
        def _step(s):
            slot = self.slot(count + s)
            plgpu.barrier_wait(self.full.at[slot])
            for half, accumulator in enumerate(accumulators):
                plgpu.wgmma(accumulator, self.lhs_rows(slot), self.rhs_view(half, slot))
            plgpu.wgmma_wait(halves)  # this step's products may still run; the last one's are done

            @pl.when(s > 0)
            def _():
                plgpu.barrier_arrive(self.empty.at[self.slot(count + s - 1)])

        sums = [accumulator[...] for accumulator in accumulators]
        plgpu.barrier_arrive(self.empty.at[self.slot(count + steps - 1)])
        return sums

    def lhs_rows(self, slot):
        rows = self.plan.warpgroup_m
        return self.lhs.at[slot].at[pl.ds(self.warpgroup * rows, rows)]

    def rhs_view(self, half: int, slot):
        tile = self.rhs.at[half, slot]
        return tile.transpose((1, 0)) if self.plan.transposed else tile

    def store(self, sums, row, column, count) -> None:
        """Stages the sums `store_n` columns at a time and copies them out."""
        plan, c = self.plan, self.config
        m0 = row * c.block_m + self.warpgroup * plan.warpgroup_m
        local = column - plan.select(column, plan.first_tiles)
        piece = 0
        for i in range(plan.masked_steps + plan.tail_steps):
            plgpu.barrier_wait(self.full.at[self.slot(count + i)])
        for i in range(plan.warpgroup_m // 64):
            for j in range(plan.tile_n // c.store_n):
                part = [v[i * 64 : (i + 1) * 64, j * c.store_n : (j + 1) * c.store_n] for v in sums]
                at = (m0 + i * 64, local * plan.tile_n + j * c.store_n)
                for output, value in enumerate(self.finish(part, at, column, count, i, j)):
                    self.copy_out(value, at, column, output, piece)
                    piece += 1

    def finish(self, part, at, column, count, i: int, j: int):
        """Returns what to store of one piece of the tile, per output."""
        plan, c = self.plan, self.config
        if plan.bias is not None:
            n0 = column * plan.tile_n + j * c.store_n
            source = self.inputs[plan.bias].at[pl.ds(n0, c.store_n)]
            bias = plgpu.load(source, optimized=False)
            bias = lax.broadcast_in_dim(bias.astype(jnp.float32), part[0].shape, (1,))
            part = [v + bias for v in part]
        if plan.masked_steps:
            part = [part[0] + self.dropped(at, count, i, j)]
        if plan.epilogue == "store":
            return part
        gate, up = part
        sigmoid = 1.0 / (1.0 + jnp.exp(-gate))
        if plan.epilogue == "swiglu":
            return [gate * sigmoid * up]
        if plan.epilogue == "swiglu_keep":
            return [gate * sigmoid * up, gate, up]
        d_act = self.lhs_tail(count, i, j).astype(jnp.float32)
        d_gate = d_act * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        return [d_gate, d_act * gate * sigmoid]

    def lhs_tail(self, count, i: int, j: int):
        rows = pl.ds(self.warpgroup * self.plan.warpgroup_m + i * 64, 64)
        return self.lhs.at[self.slot(count + j)][rows, :]

    def dropped(self, at, count, i: int, j: int):
        """Returns the dropped term's part of one piece, ``mask ∘ (lhs·rhsᵀ) / keep``."""
        plan, width = self.plan, self.config.store_n
        rows = pl.ds(self.warpgroup * plan.warpgroup_m + i * 64, 64)

        def multiply(accumulator):
            for step in range(plan.masked_steps):
                slot = self.slot(count + step)
                columns = self.rhs.at[0, slot].at[pl.ds(j * width, width)]
                lhs = self.lhs.at[slot].at[rows]
                plgpu.wgmma(accumulator, lhs, columns.transpose((1, 0)))
            return accumulator[...]

        product = pl.run_scoped(multiply, plgpu.ACC((64, width), jnp.float32))
        assert plan.seed is not None
        seed = self.inputs[plan.seed]
        keep = tile_mask(seed, at, product.shape, plan.rate)
        return jnp.where(keep, product * (1.0 / keep_probability(plan.rate)), 0.0)

    def copy_out(self, value, at, column, output: int, piece: int) -> None:
        plan, c = self.plan, self.config
        slot = piece % c.store_slots
        # The copy that used this buffer last must have read it.
        plgpu.wait_smem_to_gmem(c.store_slots - 1, wait_read_only=True)
        self.staging[self.warpgroup, slot] = value.astype(self.staging.dtype)
        plgpu.commit_smem()
        place = (pl.ds(at[0], 64), pl.ds(at[1], c.store_n))

        def copy(group: int) -> None:
            destination = self.outputs[output if plan.epilogue != "store" else group]
            plgpu.copy_smem_to_gmem(self.staging.at[self.warpgroup, slot], destination.at[*place])

        plan.for_each_group(column, copy)


def tile_mask(seed, at, shape: tuple[int, int], rate: float):
    """Returns the dropout mask of the tile whose first element is at row and column `at`."""
    layout = plgpu.Layout.WGMMA
    row = plgpu.broadcasted_iota(jnp.uint32, shape, 0, layout=layout)
    column = plgpu.broadcasted_iota(jnp.uint32, shape, 1, layout=layout) + at[1].astype(jnp.uint32)
    row0 = at[0].astype(jnp.uint32) + seed[2]
    return keep_mask(seed[0], seed[1], row0, row, column, rate)
