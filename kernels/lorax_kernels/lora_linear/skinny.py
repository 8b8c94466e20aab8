"""The products with a side of only r: one pass over a large matrix each, bound by memory.

    project     t·uᵀ                              h = x·A
    gradient    tᵀ·v                              dA = xᵀ·g
                tᵀ·v and t·uᵀ, t read once        dB = hᵀ·dy and g = dy·Bᵀ

t is (m, c). Sums that several CTAs contribute to are written as float32 parts and added afterwards
in a fixed order, so results repeat bit by bit; nothing is added atomically.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lorax_kernels.device import core_count
from lorax_kernels.lora_linear.dropout import keep_probability
from lorax_kernels.lora_linear.kernel import STEP, Dropout, swizzled_memory, tile_mask

ROWS = 128  # rows of a tile of `gradient`: 64 per warpgroup where t·u is formed
COLUMNS = 128  # columns of a tile: two boxes of one swizzled row each
REGISTERS, FEED_REGISTERS = 232, 40  # per thread: 2 · 232 + 40 fit 64 Ki registers


def padded_rank(r: int) -> int:
    """Returns the rank that the kernels compute with: 16, 32, 64, or a multiple of 64."""
    for size in (16, 32, 64):
        if r <= size:
            return size
    return -(-r // 64) * 64


@dataclasses.dataclass(frozen=True)
class SkinnyConfig:
    """How a pass is cut.

    Attributes:
        row_blocks: In how many blocks `gradient` cuts the rows of t, as equal as tiles allow;
            `project` takes 64 rows each.
        block_c: Columns of t that one CTA walks through.
        stages: Slots of the ring.
        boxes: Boxes of 64 columns per slot of `project`, even.
        v_slots: Slots for v in `gradient`.
    """

    row_blocks: int
    block_c: int
    stages: int
    boxes: int = 2
    v_slots: int = 2


def project(
    t: jax.Array,
    u: jax.Array,
    *,
    config: SkinnyConfig,
    mask: Dropout | None = None,
    sms: int | None = None,
) -> jax.Array:
    """Returns ``dropout(t)·uᵀ`` as parts to add up, (parts, m, r): t's dtype if one, else float32.

    Args:
        t: (m, c).
        u: (r, c); r as `padded_rank` returns it.
        config: How the pass is cut.
        mask: Dropout of t.
        sms: CTAs to launch; None asks the device.
    """
    (m, c), r = t.shape, u.shape[0]
    rows, parts, stages, boxes = -(-m // 64), -(-c // config.block_c), config.stages, config.boxes
    steps = -(-min(c, config.block_c) // (boxes * STEP))
    dtype = t.dtype
    out_dtype = dtype if parts == 1 else jnp.float32
    piece = min(r, STEP)

    def body(*refs, t_ring, u_ring, sums, staging, full, empty, given, taken):
        t_hbm, u_hbm, *seed, out = refs
        warpgroup = lax.axis_index("warpgroup")
        slot_of = lambda count: lax.rem(count, jnp.int32(stages))
        column = lambda part, s, box: part * config.block_c + (s * boxes + box) * STEP

        def feed():
            plgpu.set_max_registers(FEED_REGISTERS, action="decrease")

            def block(info, count):
                row, part = info.index

                @pl.loop(0, steps)
                def _step(s):
                    slot = slot_of(count + s)

                    @pl.when(count + s >= stages)
                    def _():
                        plgpu.barrier_wait(empty.at[slot])

                    for box in range(boxes):
                        cs = pl.ds(column(part, s, box), STEP)
                        source = t_hbm.at[pl.ds(row * 64, 64), cs]
                        plgpu.copy_gmem_to_smem(source, t_ring.at[slot, box], full.at[slot])
                        plgpu.copy_gmem_to_smem(u_hbm.at[:, cs], u_ring.at[slot, box], full.at[slot])

                return count + steps

            _drain(_blocks(rows, parts, block), stages, empty, slot_of)

        def accumulate(row, part, count, accumulator):
            @pl.loop(0, steps)
            def _step(s):
                slot = slot_of(count + s)
                plgpu.barrier_wait(full.at[slot])
                for half in range(boxes // 2):
                    box = half * 2 + warpgroup
                    tile = t_ring.at[slot, box]
                    if mask is not None:
                        _drop(tile, (row * 64, column(part, s, box)), seed[0], mask.rate)
                    plgpu.wgmma(accumulator, tile, u_ring.at[slot, box].transpose((1, 0)))
                plgpu.wgmma_wait(boxes // 2)

                @pl.when(s > 0)
                def _():
                    plgpu.barrier_arrive(empty.at[slot_of(count + s - 1)])

            return accumulator[...]

        def multiply():
            plgpu.set_max_registers(REGISTERS, action="increase")

            def block(info, count):
                row, part = info.index
                total = pl.run_scoped(
                    functools.partial(accumulate, row, part, count),
                    plgpu.ACC((64, r), jnp.float32),
                )
                plgpu.barrier_arrive(empty.at[slot_of(count + steps - 1)])
                if mask is not None:
                    total = total * (1.0 / keep_probability(mask.rate))
                for j in range(r // piece):
                    part_sum = total[:, j * piece : (j + 1) * piece]
                    columns = pl.ds(j * piece, piece)

                    # The second warpgroup hands its columns' share of the sum to the first.
                    @pl.when(warpgroup == 1)
                    def _give(part_sum=part_sum):
                        sums[...] = part_sum
                        plgpu.barrier_arrive(given)
                        plgpu.barrier_wait(taken)

                    @pl.when(warpgroup == 0)
                    def _take(part_sum=part_sum, columns=columns):
                        plgpu.barrier_wait(given)
                        both = (part_sum + sums[...]).astype(out_dtype)
                        plgpu.barrier_arrive(taken)
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        staging[...] = both
                        plgpu.commit_smem()
                        place = out.at[part, pl.ds(row * 64, 64), columns]
                        plgpu.copy_smem_to_gmem(staging, place)

                return count + steps

            _blocks(rows, parts, block)
            plgpu.wait_smem_to_gmem(0)

        lax.cond(warpgroup == 2, feed, multiply)

    memory = functools.partial(swizzled_memory, dtype=dtype)
    return _launch(
        body,
        "lora_project",
        jax.ShapeDtypeStruct((parts, m, r), out_dtype),
        {
            "t_ring": memory((stages, boxes, 64, STEP)),
            "u_ring": memory((stages, boxes, r, STEP)),
            "sums": swizzled_memory((64, piece), jnp.float32),
            "staging": swizzled_memory((64, piece), out_dtype),
            "full": plgpu.Barrier(num_arrivals=2 * boxes, num_barriers=stages),
            "empty": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            "given": plgpu.Barrier(),
            "taken": plgpu.Barrier(),
        },
        sms,
    )(t, u, *([] if mask is None else [mask.seed]))


def gradient(
    t: jax.Array,
    v: jax.Array,
    u: jax.Array | None = None,
    *,
    config: SkinnyConfig,
    columns: tuple[int, int] | None = None,
    mask: Dropout | None = None,
    sms: int | None = None,
) -> list[jax.Array]:
    """Returns ``dropout(t)ᵀ·v``, and ``t·uᵀ`` too if `u` is given, from one read of t.

    Args:
        t: (m, c).
        v: (m, r); r as `padded_rank` returns it.
        u: (at most 64, c).
        columns: Which of v's columns to take, (first, number), in multiples of 64; None is all.
        config: How the pass is cut.
        mask: Dropout of t, without `u`.
        sms: CTAs to launch; None asks the device.

    Returns:
        Parts to add up, float32: (row blocks, c, r), and (column blocks, m, r) if `u` is given.
    """
    m, c = t.shape
    first, r = columns or (0, v.shape[1])
    wide, stages = -(-r // STEP) * STEP, config.stages
    u_rank = 0 if u is None else u.shape[0]
    row_blocks, column_blocks = config.row_blocks, -(-c // config.block_c)
    chunks, tiles = -(-m // ROWS), config.block_c // COLUMNS
    first_chunk = lambda i: lax.div(i * chunks, jnp.int32(row_blocks))
    dtype, both, v_slots = t.dtype, u is not None, config.v_slots

    def body(*refs, t_ring, v_ring, staging, full, empty, v_full, v_empty, u_ring=None, narrow=None):
        outputs = refs[-2:] if both else refs[-1:]
        t_hbm, v_hbm, *rest = refs[: -len(outputs)]
        warpgroup = lax.axis_index("warpgroup")
        slot_of = lambda count: lax.rem(count, jnp.int32(stages))
        v_slot_of = lambda count: lax.rem(count, jnp.int32(v_slots))

        def feed():
            plgpu.set_max_registers(FEED_REGISTERS, action="decrease")

            def block(info, count):
                i, j = info.index
                begin, own = first_chunk(i), first_chunk(i + 1) - first_chunk(i)

                @pl.loop(0, own)
                def _chunk(s):
                    chunk = count + s
                    rows = pl.ds((begin + s) * ROWS, ROWS)

                    @pl.when(chunk >= v_slots)
                    def _():
                        plgpu.barrier_wait(v_empty.at[v_slot_of(chunk)])

                    source = v_hbm.at[rows, pl.ds(first, wide)]
                    v_slot = v_slot_of(chunk)
                    plgpu.copy_gmem_to_smem(source, v_ring.at[v_slot], v_full.at[v_slot])
                    for tile in range(tiles):
                        it = chunk * tiles + tile
                        slot = slot_of(it)

                        @pl.when(it >= stages)
                        def _(slot=slot):
                            plgpu.barrier_wait(empty.at[slot])

                        for box in range(2):
                            cs = pl.ds(j * config.block_c + tile * COLUMNS + box * STEP, STEP)
                            source = t_hbm.at[rows, cs]
                            plgpu.copy_gmem_to_smem(source, t_ring.at[slot, box], full.at[slot])
                            if both:
                                source = rest[0].at[:, cs]
                                plgpu.copy_gmem_to_smem(source, u_ring.at[slot, box], full.at[slot])

                return count + own

            total = _blocks(row_blocks, column_blocks, block)
            left = jnp.minimum(total, v_slots)

            @pl.loop(0, left)
            def _drain_v(k):
                plgpu.barrier_wait(v_empty.at[v_slot_of(total - left + k)])

            _drain(total * tiles, stages, empty, slot_of)

        def multiply():
            plgpu.set_max_registers(REGISTERS, action="increase")

            def step(it, v_slot, place, gradient_sum, project_sum):
                slot = slot_of(it)
                plgpu.barrier_wait(full.at[slot])
                own = t_ring.at[slot, warpgroup]
                if mask is not None:
                    _drop(own, place, rest[0], mask.rate)
                if both:
                    for box in range(2):
                        rows = t_ring.at[slot, box].at[pl.ds(warpgroup * 64, 64)]
                        plgpu.wgmma(project_sum, rows, u_ring.at[slot, box].transpose((1, 0)))
                plgpu.wgmma(gradient_sum, own.transpose((1, 0)), v_ring.at[v_slot])

            def walk(count, begin, own, j, *sums):
                @pl.loop(0, own)
                def _chunk(s):
                    chunk = count + s
                    v_slot = v_slot_of(chunk)
                    plgpu.barrier_wait(v_full.at[v_slot])
                    m0 = (begin + s) * ROWS

                    def run(project_sum=None):
                        for tile in range(tiles):
                            it = chunk * tiles + tile
                            c0 = j * config.block_c + tile * COLUMNS + warpgroup * STEP
                            step(it, v_slot, (m0, c0), sums[tile], project_sum)
                            plgpu.wgmma_wait(3 if both else 1)
                            if tile:
                                plgpu.barrier_arrive(empty.at[slot_of(it - 1)])
                        if project_sum is not None:
                            return project_sum[...]
                        plgpu.wgmma_wait(0)

                    if both:
                        projected = pl.run_scoped(run, plgpu.ACC((64, u_rank), jnp.float32))
                    else:
                        projected = run()
                    plgpu.barrier_arrive(empty.at[slot_of(chunk * tiles + tiles - 1)])
                    plgpu.barrier_arrive(v_empty.at[v_slot])
                    if both:
                        rows = m0 + warpgroup * 64
                        buffer = staging if narrow is None else narrow
                        _write(projected, buffer, outputs[1], j, rows, warpgroup)

                return [total[...] for total in sums]

            def block(info, count):
                i, j = info.index
                begin, own = first_chunk(i), first_chunk(i + 1) - first_chunk(i)
                scope = [plgpu.ACC((64, wide), jnp.float32)] * tiles
                totals = pl.run_scoped(functools.partial(walk, count, begin, own, j), *scope)
                for tile, total in enumerate(totals):
                    if mask is not None:
                        total = total * (1.0 / keep_probability(mask.rate))
                    c0 = j * config.block_c + tile * COLUMNS + warpgroup * STEP
                    _write(total, staging, outputs[0], i, c0, warpgroup)
                return count + own

            _blocks(row_blocks, column_blocks, block)
            plgpu.wait_smem_to_gmem(0)

        lax.cond(warpgroup == 2, feed, multiply)

    memory = functools.partial(swizzled_memory, dtype=dtype)
    outputs = [jax.ShapeDtypeStruct((row_blocks, c, r), jnp.float32)]
    scratch: dict[str, Any] = {
        "t_ring": memory((stages, 2, ROWS, STEP)),
        "v_ring": memory((v_slots, ROWS, wide)),
        "staging": swizzled_memory((2, 64, STEP), jnp.float32),
        "full": plgpu.Barrier(num_arrivals=4 if both else 2, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "v_full": plgpu.Barrier(num_arrivals=1, num_barriers=v_slots),
        "v_empty": plgpu.Barrier(num_arrivals=2, num_barriers=v_slots),
    }
    if both:
        outputs.append(jax.ShapeDtypeStruct((column_blocks, m, u_rank), jnp.float32))
        if u_rank != STEP:
            scratch["narrow"] = swizzled_memory((2, 64, u_rank), jnp.float32)
        scratch["u_ring"] = memory((stages, 2, u_rank, STEP))
    extra = [u] if u is not None else [] if mask is None else [mask.seed]
    name = "lora_project_gradient" if both else "lora_gradient"
    return list(_launch(body, name, outputs, scratch, sms)(t, v, *extra))


def _launch(body, name: str, outputs, scratch, sms: int | None):
    body.__name__ = name
    return plgpu.kernel(
        body,
        out_type=outputs,
        grid=(sms or core_count(),),
        grid_names=("sm",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )


def _blocks(rows: int, columns: int, body):
    """Runs ``body(info, count) -> count`` over this CTA's blocks and returns the last count."""
    loop = plgpu.nd_loop((rows, columns), collective_axes="sm", init_carry=jnp.int32(0))
    return loop(lambda info, carry: body(info, carry))


def _drain(total, stages: int, empty, slot_of) -> None:
    left = jnp.minimum(total, stages)

    @pl.loop(0, left)
    def _(i):
        plgpu.barrier_wait(empty.at[slot_of(total - left + i)])


def _drop(box, at, seed, rate: float) -> None:
    """Zeroes the dropped elements of a box of shared memory, whose first element is at `at`."""
    rows, columns = box.shape
    for i in range(rows // 64):
        part = box.at[pl.ds(i * 64, 64)]
        keep = tile_mask(seed, (at[0] + i * 64, at[1]), (64, columns), rate)
        part[...] = jnp.where(keep, part[...], jnp.zeros((), box.dtype))
    plgpu.commit_smem()


def _write(total, staging, output, part, row, warpgroup) -> None:
    """Copies (64, n) sums to rows `row` onward of part `part`, at most 64 columns at a time."""
    width = min(total.shape[1], STEP)
    for j in range(total.shape[1] // width):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        box = staging.at[warpgroup]
        box[...] = total[:, j * width : (j + 1) * width]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(box, output.at[part, pl.ds(row, 64), pl.ds(j * width, width)])
