"""``tᵀ·v``: dA = xᵀ·g; and with ``t·uᵀ`` in the same pass, dB = hᵀ·dy and g = dy·Bᵀ."""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lorax_kernels.lora_linear.dropout import keep_probability
from lorax_kernels.lora_linear.memory import swizzled_memory
from lorax_kernels.lora_linear.plan import STEP, Dropout
from lorax_kernels.lora_linear.skinny import COLUMNS, ROWS, SkinnyConfig, blocks, drop, write
from lorax_kernels.lora_linear.warpgroups import divide, drain, launch


# Of several passes of one shape only the first is traced and lowered, which takes a quarter of a
# second.
@functools.partial(jax.jit, static_argnames=("config", "columns", "sms"))
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
        columns: Columns of v to use, (first, number): a multiple of 64, and a number that
            `padded_rank` returns; None is all.
        config: The tiling of the pass.
        mask: Dropout of t, without `u`.
        sms: CTAs to launch; None asks the device.

    Returns:
        Parts to add up, float32: (row blocks, c, r), and (column blocks, m, r) if `u` is given.
    """
    m, c = t.shape
    first, r = columns or (0, v.shape[1])
    wide = -(-r // STEP) * STEP
    stages = config.stages
    u_rank = 0 if u is None else u.shape[0]
    row_blocks = config.row_blocks
    column_blocks = -(-c // config.block_c)
    chunks = -(-m // ROWS)
    tiles = config.block_c // COLUMNS

    def first_chunk(i):
        return lax.div(i * chunks, jnp.int32(row_blocks))

    dtype = t.dtype
    both = u is not None
    v_slots = config.v_slots

    def body(
        *refs, t_ring, v_ring, staging, full, empty, v_full, v_empty, u_ring=None, narrow=None
    ):
        outputs = refs[-2:] if both else refs[-1:]
        t_hbm, v_hbm, *rest = refs[: -len(outputs)]
        warpgroup = lax.axis_index("warpgroup")

        def slot_of(count):
            return lax.rem(count, jnp.int32(stages))

        def v_slot_of(count):
            return lax.rem(count, jnp.int32(v_slots))

        def feed():
            def block(info, count):
                i, j = info.index
                begin = first_chunk(i)
                own = first_chunk(i + 1) - first_chunk(i)

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
                            if u_ring is not None:
                                source = rest[0].at[:, cs]
                                plgpu.copy_gmem_to_smem(source, u_ring.at[slot, box], full.at[slot])

                return count + own

            total = blocks(row_blocks, column_blocks, block)
            drain(total, v_slots, v_empty, v_slot_of)
            drain(total * tiles, stages, empty, slot_of)

        def multiply():
            def step(it, v_slot, place, gradient_sum, project_sum):
                slot = slot_of(it)
                plgpu.barrier_wait(full.at[slot])
                own = t_ring.at[slot, warpgroup]
                if mask is not None:
                    drop(own, place, rest[0], mask.rate)
                if u_ring is not None:
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
                        write(projected, buffer, outputs[1], j, rows, warpgroup)

                return [total[...] for total in sums]

            def block(info, count):
                i, j = info.index
                begin = first_chunk(i)
                own = first_chunk(i + 1) - first_chunk(i)
                scope = [plgpu.ACC((64, wide), jnp.float32)] * tiles
                totals = pl.run_scoped(functools.partial(walk, count, begin, own, j), *scope)
                for tile, total in enumerate(totals):
                    if mask is not None:
                        total = total * (1.0 / keep_probability(mask.rate))
                    c0 = j * config.block_c + tile * COLUMNS + warpgroup * STEP
                    write(total, staging, outputs[0], i, c0, warpgroup)
                return count + own

            blocks(row_blocks, column_blocks, block)
            plgpu.wait_smem_to_gmem(0)

        divide(feed, multiply)

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
    return list(launch(body, name, outputs, scratch, sms)(t, v, *extra))
