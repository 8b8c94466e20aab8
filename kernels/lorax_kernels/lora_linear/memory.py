"""Shared memory in the layout of the tensor cores, and the dropout mask of a tile of registers."""

from typing import Any, cast

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from lorax_kernels.lora_linear.dropout import keep_mask


def swizzled_memory(shape: tuple[int, ...], dtype, minor: int | None = None) -> Any:
    """Returns shared memory for tiles in the layout that tensor cores and copies share.

    Args:
        shape: Shape of the memory.
        dtype: Dtype of its elements.
        minor: Elements of a swizzled row, if not as many as `shape` allows.
    """
    bits = jnp.finfo(dtype).bits
    swizzle = plgpu.find_swizzle((minor or shape[-1]) * bits)
    # Pyright considers the two classes abstract: they lack a method that is not called here.
    tiling = cast(Any, plgpu.TilingTransform)((8, swizzle * 8 // bits))
    swizzling = cast(Any, plgpu.SwizzleTransform)(swizzle)
    return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzling))


def tile_mask(seed, at, shape: tuple[int, int], rate: float):
    """Returns the dropout mask of the tile whose first element is at row and column `at`."""
    layout = plgpu.Layout.WGMMA
    row = plgpu.broadcasted_iota(jnp.uint32, shape, 0, layout=layout)
    column = plgpu.broadcasted_iota(jnp.uint32, shape, 1, layout=layout) + at[1].astype(jnp.uint32)
    row0 = at[0].astype(jnp.uint32) + seed[2]
    return keep_mask(seed[0], seed[1], row0, row, column, rate)
