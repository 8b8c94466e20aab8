"""The first columns of the matmul together with h: ``h = x·A`` without another read of x.

The narrow matmul runs in the same loop, on the same tiles of x, into accumulators of its own. That
slows a tile down by an eighth at rank 16, so only as many columns of tiles are computed this way as
occupy the device once; `grouped_matmul` computes the others from h. Tiles of the first column write
h.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from lorax_kernels.lora_linear.kernel import launch_roles
from lorax_kernels.lora_linear.memory import swizzled_memory
from lorax_kernels.lora_linear.plan import STEP, MatmulConfig, PlacedTerm, Plan, place
from lorax_kernels.lora_linear.roles import Feeder, Multiplier


class InlineTerm(NamedTuple):
    """``lhs·rhs`` for the result and ``lhs·uᵀ`` for h.

    Attributes:
        lhs: (m, k).
        rhs: (k, n), or (n, k) when the matmul is transposed.
        u: (r, ≥ k).
        column: Where the term's columns begin in `u`.
    """

    lhs: jax.Array
    rhs: jax.Array
    u: jax.Array
    column: int = 0


@dataclasses.dataclass(frozen=True)
class _InlinePlan(Plan):
    u: tuple[tuple[int, int], ...] = ()  # number of the argument, first column
    b: int = 0
    rank: int = 0
    width: int = 0  # columns to compute, whole tiles

    @property
    def name(self) -> str:
        return f"lora_inline_{'nt' if self.transposed else 'nn'}"

    @property
    def copies(self) -> int:
        return 3

    @property
    def tiles(self) -> tuple[int, int]:
        return super().tiles[0], self.width // self.tile_n


def inline_matmul(
    terms: Sequence[InlineTerm],
    b: jax.Array,
    *,
    n: int,
    width: int,
    config: MatmulConfig,
    transposed: bool = False,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    factor: jax.Array | None = None,
    keep: bool = False,
    sms: int | None = None,
) -> list[jax.Array]:
    """Computes ``h = Σ lhs·uᵀ`` and the first columns of a result that reads it.

    The result is ``(factor·)(Σ lhs·rhs + h·b) (+ bias + residual)``.

    Args:
        terms: The operands.
        b: (r, ≥ n), for a transposed matmul too; r is 16, 32 or 64.
        n: Columns of the result.
        width: Columns to compute, in whole tiles; the others are undefined.
        config: The tiling of the matmul.
        transposed: Whether right operands are (n, k) and read as their transposes, in place.
        bias: (n,) padded to whole tiles.
        residual: (m, n) to add to; `config` must stage 64 columns at a time.
        factor: (n,) padded to whole tiles.
        keep: Whether to return what the factor multiplies too.
        sms: CTAs to launch; None asks the device.

    Returns:
        The (m, n) result, with `keep` the product before the factor too, and h (m, r), in the
        operands' dtype.
    """
    arrays: list[jax.Array] = []
    number = functools.partial(place, arrays)
    r = b.shape[0]
    m = terms[0].lhs.shape[0]
    placed = tuple(PlacedTerm(number(t.lhs), (number(t.rhs),), t.lhs.shape[1]) for t in terms)
    plan = _InlinePlan(
        config=config,
        epilogue="store" if residual is None else "add",
        transposed=transposed,
        rate=0.0,
        m=m,
        columns=(n,),
        terms=(placed,),
        masked_steps=0,
        seed=None,
        bias=None if bias is None else number(bias),
        tail=() if residual is None else (number(residual),),
        outputs=3 if keep else 2,
        u=tuple((number(t.u), t.column) for t in terms),
        b=number(b),
        rank=r,
        width=width,
        factors=() if factor is None else (number(factor),),
        keep=keep,
    )
    dtype = terms[0].lhs.dtype
    c = config
    # The tensor cores need both operands of h·b in one swizzle, that of h's short rows.
    rows = functools.partial(swizzled_memory, dtype=dtype, minor=min(r, STEP))
    results = launch_roles(
        _InlineFeeder,
        _InlineMultiplier,
        plan,
        dtype,
        [jax.ShapeDtypeStruct((m, columns), dtype) for columns in (*[n] * plan.writes, r)],
        sms=sms,
        u_ring=swizzled_memory((c.stages, r, STEP), dtype),
        h_box=rows((2, c.block_m // 2, r)),
        b_box=rows((r, c.block_n)),
        b_full=plgpu.Barrier(),
        b_empty=plgpu.Barrier(num_arrivals=2),
    )(*arrays)
    return list(results)


class _InlineFeeder(Feeder):
    plan: _InlinePlan
    u_ring: Any
    b_box: Any
    b_full: Any
    b_empty: Any

    @property
    def single_empty(self):
        return self.b_empty

    def feed_tile(self, row, column, count):
        plan = self.plan
        first = count == 0
        for term, (u, u_column) in zip(plan.terms[0], plan.u, strict=True):
            steps = -(-term.k // STEP)

            @pl.loop(0, steps)
            def _step(s, count=count, term=term, u=u, u_column=u_column):
                k0 = s * STEP
                self.copy(count + s, term, row, k0, k0, column * plan.tile_n)
                slot = self.slot(count + s)
                source = self.refs[u].at[:, pl.ds(u_column + k0, STEP)]
                plgpu.copy_gmem_to_smem(source, self.u_ring.at[slot], self.full.at[slot])

            count += steps

        # b has one buffer, free once the last tile's h·b is done, and is awaited last.
        @pl.when(jnp.logical_not(first))
        def _():
            plgpu.barrier_wait(self.b_empty)

        ns = pl.ds(column * plan.tile_n, plan.tile_n)
        plgpu.copy_gmem_to_smem(self.refs[plan.b].at[:, ns], self.b_box, self.b_full)
        return self.feed_tail(row, column, count)


class _InlineMultiplier(Multiplier):
    plan: _InlinePlan
    u_ring: Any
    h_box: Any
    b_box: Any
    b_full: Any
    b_empty: Any

    def multiply_tile(self, row, column, count):
        plan = self.plan
        steps = plan.steps(0)
        accumulate = functools.partial(self.accumulate_both, row, column, count, steps)
        total = pl.run_scoped(
            accumulate,
            plgpu.ACC((plan.warpgroup_m, plan.tile_n), jnp.float32),
            plgpu.ACC((plan.warpgroup_m, plan.rank), jnp.float32),
        )
        count += steps
        self.store([total], row, column, count)
        return count + plan.tail_steps

    def accumulate_both(self, row, column, count, steps, wide, narrow):
        plan = self.plan

        @pl.loop(0, steps)
        def _step(s):
            slot = self.slot(count + s)
            plgpu.barrier_wait(self.full.at[slot])
            lhs = self.lhs_rows(slot)
            plgpu.wgmma(narrow, lhs, self.u_ring.at[slot].transpose((1, 0)))
            plgpu.wgmma(wide, lhs, self.rhs_view(0, slot))
            plgpu.wgmma_wait(2)

            @pl.when(s > 0)
            def _():
                plgpu.barrier_arrive(self.empty.at[self.slot(count + s - 1)])

        h = narrow[...].astype(self.h_box.dtype)
        plgpu.barrier_arrive(self.empty.at[self.slot(count + steps - 1)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last tile's h must have left
        box = self.h_box.at[self.warpgroup]
        box[...] = h
        plgpu.commit_smem()
        plgpu.barrier_wait(self.b_full)
        plgpu.wgmma(wide, box, self.b_box)
        total = wide[...]
        plgpu.barrier_arrive(self.b_empty)

        @pl.when(column == 0)
        def _():
            m0 = row * self.config.block_m + self.warpgroup * plan.warpgroup_m
            plgpu.copy_smem_to_gmem(box, self.outputs[-1].at[pl.ds(m0, plan.warpgroup_m), :])

        return total
