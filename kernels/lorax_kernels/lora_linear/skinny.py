"""The matmuls with a side of only r: one pass over a large matrix each, bound by memory.

    project     t·uᵀ                              h = x·A
    gradient    tᵀ·v                              dA = xᵀ·g
                tᵀ·v and t·uᵀ, t read once        dB = hᵀ·dy and g = dy·Bᵀ

t is (m, c). Sums over several CTAs are written as float32 parts and added afterwards in a fixed
order, so results repeat bit by bit; nothing is added atomically.

This file holds the parts that the two kernels share.
"""

import dataclasses

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from lorax_kernels.lora_linear.memory import tile_mask
from lorax_kernels.lora_linear.plan import STEP

ROWS = 128  # rows of a tile of `gradient`: 64 per warpgroup where t·u is formed
COLUMNS = 128  # columns of a tile: two boxes of one swizzled row each


@dataclasses.dataclass(frozen=True)
class SkinnyConfig:
    """The tiling of a pass.

    Attributes:
        row_blocks: Number of blocks of t's rows in `gradient`, as equal as tiles allow; `project`
            takes 64 rows each.
        block_c: Columns of t per CTA.
        stages: Slots of the ring.
        boxes: Boxes of 64 columns per slot of `project`, even.
        v_slots: Slots for v in `gradient`.
    """

    row_blocks: int
    block_c: int
    stages: int
    boxes: int = 2
    v_slots: int = 2


def blocks(rows: int, columns: int, body):
    """Runs ``body(info, count) -> count`` over this CTA's blocks and returns the last count."""
    loop = plgpu.nd_loop((rows, columns), collective_axes="sm", init_carry=jnp.int32(0))
    return loop(lambda info, carry: body(info, carry))


def drop(box, at, seed, rate: float) -> None:
    """Zeroes the dropped elements of a box of shared memory, whose first element is at `at`."""
    rows, columns = box.shape
    for i in range(rows // 64):
        part = box.at[pl.ds(i * 64, 64)]
        keep = tile_mask(seed, (at[0] + i * 64, at[1]), (64, columns), rate)
        part[...] = jnp.where(keep, part[...], jnp.zeros((), box.dtype))
    plgpu.commit_smem()


def write(total, staging, output, part, row, warpgroup) -> None:
    """Copies (64, n) sums to rows `row` onward of part `part`, at most 64 columns at a time."""
    width = min(total.shape[1], STEP)
    for j in range(total.shape[1] // width):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        box = staging.at[warpgroup]
        box[...] = total[:, j * width : (j + 1) * width]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(box, output.at[part, pl.ds(row, 64), pl.ds(j * width, width)])
