"""``t·uᵀ``: h = x·A, and g = dy·Bᵀ where it is computed on its own."""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lorax_kernels.lora_linear.dropout import keep_probability
from lorax_kernels.lora_linear.memory import swizzled_memory
from lorax_kernels.lora_linear.plan import STEP, Dropout
from lorax_kernels.lora_linear.skinny import SkinnyConfig, blocks, drop
from lorax_kernels.lora_linear.warpgroups import divide, drain, launch


@functools.partial(jax.jit, static_argnames=("config", "sms"))  # as `gradient` is
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
        config: The tiling of the pass.
        mask: Dropout of t.
        sms: CTAs to launch; None asks the device.
    """
    m, c = t.shape
    r = u.shape[0]
    rows = -(-m // 64)
    parts = -(-c // config.block_c)
    stages = config.stages
    boxes = config.boxes
    steps = -(-min(c, config.block_c) // (boxes * STEP))
    dtype = t.dtype
    out_dtype = dtype if parts == 1 else jnp.float32
    piece = min(r, STEP)

    def body(*refs, t_ring, u_ring, sums, staging, full, empty, given, taken):
        t_hbm, u_hbm, *seed, out = refs
        warpgroup = lax.axis_index("warpgroup")

        def slot_of(count):
            return lax.rem(count, jnp.int32(stages))

        def column(part, s, box):
            return part * config.block_c + (s * boxes + box) * STEP

        def feed():
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
                        plgpu.copy_gmem_to_smem(
                            u_hbm.at[:, cs], u_ring.at[slot, box], full.at[slot]
                        )

                return count + steps

            drain(blocks(rows, parts, block), stages, empty, slot_of)

        def accumulate(row, part, count, accumulator):
            @pl.loop(0, steps)
            def _step(s):
                slot = slot_of(count + s)
                plgpu.barrier_wait(full.at[slot])
                for half in range(boxes // 2):
                    box = half * 2 + warpgroup
                    tile = t_ring.at[slot, box]
                    if mask is not None:
                        drop(tile, (row * 64, column(part, s, box)), seed[0], mask.rate)
                    plgpu.wgmma(accumulator, tile, u_ring.at[slot, box].transpose((1, 0)))
                plgpu.wgmma_wait(boxes // 2)

                @pl.when(s > 0)
                def _():
                    plgpu.barrier_arrive(empty.at[slot_of(count + s - 1)])

            return accumulator[...]

        def multiply():
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

            blocks(rows, parts, block)
            plgpu.wait_smem_to_gmem(0)

        divide(feed, multiply)

    memory = functools.partial(swizzled_memory, dtype=dtype)
    return launch(
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
