"""The warpgroups of the matmul: one feeds the ring, two multiply and store.

The ring's counter continues across output tiles, so the next tile is loaded while this one is
stored.
"""

import functools
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lorax_kernels.lora_linear.dropout import keep_probability
from lorax_kernels.lora_linear.memory import tile_mask
from lorax_kernels.lora_linear.plan import STEP, PlacedTerm, Plan
from lorax_kernels.lora_linear.warpgroups import drain


class Role:
    """A warpgroup's part: the operands, the ring, and the order of the tiles."""

    # Of the short step, where the plan has an update.
    short_lhs: Any
    short_rhs: Any
    short_full: Any
    short_empty: Any

    def __init__(self, plan: Plan, refs, *, lhs, rhs, staging, full, empty, **scratch):
        self.plan = plan
        self.config = plan.config
        self.refs = refs
        self.outputs = refs[-plan.outputs :]
        self.lhs = lhs
        self.rhs = rhs
        self.staging = staging
        self.full = full
        self.empty = empty
        for name, ref in scratch.items():
            setattr(self, name, ref)

    def for_each_tile(self, body) -> Any:
        """Runs ``body(row tile, column tile, ring count) -> ring count`` for this CTA's tiles."""
        c = self.config
        rows, columns = self.plan.tiles
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
        """Returns the slot of the ring that step `count` uses."""
        return lax.rem(count, jnp.int32(self.config.stages))

    def tail_places(self, slot):
        """Returns the places of the tail's arrays in a slot."""
        return self.lhs.at[slot], self.rhs.at[0, slot]


class Feeder(Role):
    """Copies the operands into the ring."""

    def run(self) -> None:
        """Feeds this CTA's tiles and waits until all its copies are read."""
        total = self.for_each_tile(self.feed_tile)
        drain(total, self.config.stages, self.empty, self.slot)
        if (single := self.single_empty) is not None:
            pl.when(total > 0)(lambda: plgpu.barrier_wait(single))

    @property
    def single_empty(self):
        """Barrier of the operand that has one buffer instead of a ring, or None."""
        return self.short_empty if self.plan.update is not None else None

    def feed_tile(self, row, column, count):
        """Copies the operands of one output tile, and returns the ring count after it."""
        plan = self.plan
        first_tile = count == 0
        plan.for_each_group(column, functools.partial(self.feed_group, row, column, count))
        steps = [plan.steps(g) + plan.masked_steps for g in range(len(plan.columns))]
        count += plan.select(column, steps)
        if plan.update is not None:
            pl.when(jnp.logical_not(first_tile))(lambda: plgpu.barrier_wait(self.short_empty))
            plan.for_each_group(column, functools.partial(self.feed_update, row, column))
        return self.feed_tail(row, column, count)

    def feed_tail(self, row, column, count):
        """Copies the tail for the epilogue of one output tile; returns the ring count after it."""
        plan = self.plan
        for i in range(plan.tail_steps):
            self.copy_tail(count + i, row, column * plan.tile_n + i * STEP)
        return count + plan.tail_steps

    def feed_group(self, row, column, count, group: int) -> None:
        """Copies the operands of the group's terms, a ring slot per step."""
        plan = self.plan
        n0 = (column - plan.first_tiles[group]) * plan.tile_n
        for term in plan.terms[group]:
            steps = -(-term.k // STEP)

            @pl.loop(0, steps)
            def _step(s, count=count, term=term):
                k0 = s * STEP
                self.copy(count + s, term, row, term.column + k0, term.row + k0, n0)

            count += steps

    def feed_update(self, row, column, group: int) -> None:
        """Copies the operands of the short step, which has one buffer and is awaited last."""
        plan = self.plan
        c = self.config
        assert plan.update is not None
        lhs, rhs = (self.refs[index] for index in plan.update)
        n0 = sum(plan.columns[:group]) + (column - plan.first_tiles[group]) * c.block_n
        source = lhs.at[pl.ds(row * c.block_m, c.block_m), :]
        plgpu.copy_gmem_to_smem(source, self.short_lhs, self.short_full)
        source = rhs.at[:, pl.ds(n0, c.block_n)]
        plgpu.copy_gmem_to_smem(source, self.short_rhs, self.short_full)

    def claim(self, count):
        """Returns the slot of step `count`, once it is free."""
        slot = self.slot(count)

        @pl.when(count >= self.config.stages)
        def _():
            plgpu.barrier_wait(self.empty.at[slot])

        return slot

    def copy_tail(self, count, row, n0) -> None:
        """Copies some columns of the tail into a slot, as if they were operands."""
        c = self.config
        plan = self.plan
        slot = self.claim(count)
        rows = pl.ds(row * c.block_m, c.block_m)
        columns = pl.ds(n0, STEP)
        for index, place in zip(plan.tail, self.tail_places(slot), strict=False):
            source = self.refs[index].at[rows, columns]
            plgpu.copy_gmem_to_smem(source, place.at[pl.ds(0, c.block_m)], self.full.at[slot])
        for _ in range(plan.copies - len(plan.tail)):
            plgpu.barrier_arrive(self.full.at[slot])

    def copy(self, count, term: PlacedTerm, row, lhs_k0, k0, n0) -> None:
        """Copies one step's operands into its slot of the ring, once the slot is free."""
        c = self.config
        plan = self.plan
        slot = self.claim(count)
        rows = pl.ds(row * c.block_m, c.block_m)
        ks = pl.ds(k0, STEP)
        source = self.refs[term.lhs].at[rows, pl.ds(lhs_k0, STEP)]
        plgpu.copy_gmem_to_smem(source, self.lhs.at[slot], self.full.at[slot])
        for half, index in enumerate(term.rhs):
            source = self.refs[index]
            ns = pl.ds(term.columns[half] + n0, plan.tile_n)
            plgpu.copy_gmem_to_smem(
                source.at[ns, ks] if plan.transposed else source.at[ks, ns],
                self.rhs.at[half, slot],
                self.full.at[slot],
                collective_axes="cluster" if c.cluster > 1 else None,
            )


class Multiplier(Role):
    """Multiplies the operands in the ring and stores the result."""

    def run(self) -> None:
        """Multiplies this CTA's tiles and waits until the results are written."""
        self.warpgroup = lax.axis_index("warpgroup")
        self.for_each_tile(self.multiply_tile)
        plgpu.wait_smem_to_gmem(0)

    def multiply_tile(self, row, column, count):
        """Computes and stores one output tile and returns the ring count after it."""
        plan = self.plan
        steps = plan.select(column, [plan.steps(g) for g in range(len(plan.columns))])
        shape = (plan.warpgroup_m, plan.tile_n)
        accumulators = [plgpu.ACC(shape, jnp.float32)] * plan.halves
        sums = pl.run_scoped(functools.partial(self.accumulate, count, steps), *accumulators)
        count += steps
        self.store(sums, row, column, count)
        for i in range(plan.masked_steps):
            plgpu.barrier_arrive(self.empty.at[self.slot(count + i)])
        if plan.update is not None and plan.rate:
            plgpu.barrier_arrive(self.short_empty)
        return count + plan.masked_steps + plan.tail_steps

    def accumulate(self, count, steps, *accumulators):
        """Returns the sums over `steps` steps of the ring and, without dropout, the short step."""
        halves = self.plan.halves

        @pl.loop(0, steps)
        def _step(s):
            slot = self.slot(count + s)
            plgpu.barrier_wait(self.full.at[slot])
            for half, accumulator in enumerate(accumulators):
                plgpu.wgmma(accumulator, self.lhs_rows(slot), self.rhs_view(half, slot))
            plgpu.wgmma_wait(halves)  # this step's matmuls may still run; the last one's are done

            @pl.when(s > 0)
            def _():
                plgpu.barrier_arrive(self.empty.at[self.slot(count + s - 1)])

        if self.plan.update is not None and not self.plan.rate:
            plgpu.barrier_wait(self.short_full)
            plgpu.wgmma(accumulators[0], self.short_rows(0, self.plan.warpgroup_m), self.short_rhs)
        sums = [accumulator[...] for accumulator in accumulators]
        plgpu.barrier_arrive(self.empty.at[self.slot(count + steps - 1)])
        if self.plan.update is not None and not self.plan.rate:
            plgpu.barrier_arrive(self.short_empty)
        return sums

    def short_rows(self, first: int, number: int):
        """Returns `number` of this warpgroup's rows of the short left operand, from `first` on."""
        rows = self.warpgroup * self.plan.warpgroup_m + first
        return self.short_lhs.at[pl.ds(rows, number)]

    def lhs_rows(self, slot):
        """Returns this warpgroup's rows of the left operand in `slot`."""
        rows = self.plan.warpgroup_m
        return self.lhs.at[slot].at[pl.ds(self.warpgroup * rows, rows)]

    def rhs_view(self, half: int, slot):
        """Returns a right operand in `slot` as (k, n)."""
        tile = self.rhs.at[half, slot]
        return tile.transpose((1, 0)) if self.plan.transposed else tile

    def store(self, sums, row, column, count) -> None:
        """Stages the sums `store_n` columns at a time and copies them out."""
        plan = self.plan
        c = self.config
        m0 = row * c.block_m + self.warpgroup * plan.warpgroup_m
        local = column - plan.select(column, plan.first_tiles)
        piece = 0
        for i in range(plan.masked_steps):
            plgpu.barrier_wait(self.full.at[self.slot(count + i)])
        if plan.update is not None and plan.rate:
            plgpu.barrier_wait(self.short_full)
        for j in range(plan.tile_n // c.store_n):
            if plan.tail:
                plgpu.barrier_wait(self.full.at[self.tail_slot(count, j)])
            for i in range(plan.warpgroup_m // 64):
                part = [v[i * 64 : (i + 1) * 64, j * c.store_n : (j + 1) * c.store_n] for v in sums]
                at = (m0 + i * 64, local * plan.tile_n + j * c.store_n)
                for output, value in enumerate(self.finish(part, at, column, count, i, j)):
                    self.copy_out(value, at, column, output, piece)
                    piece += 1
            if plan.tail:
                plgpu.barrier_arrive(self.empty.at[self.tail_slot(count, j)])

    def finish(self, part, at, column, count, i: int, j: int):
        """Returns the values to store for one piece of the tile, per output."""
        plan = self.plan
        products = part
        if plan.epilogue != "swiglu_back":
            part = self.scaled(products, column, j)
        if plan.bias is not None:
            bias = self.along_columns(plan.bias, column, j)
            part = [v + bias for v in part]
        if plan.rate:
            part = [part[0] + self.dropped(at, count, i, j)]
        kept = products if plan.keep else []
        if plan.epilogue == "store":
            return [*part, *kept]
        tail = self.tail(count, i, j)
        if plan.epilogue == "add":
            return [part[0] + tail[0], *kept]
        if plan.epilogue == "swiglu_back":
            part, tail = self.scaled(tail, column, j), part
        gate, up = part
        # One instruction each, good to 2⁻²¹, where an exact quotient takes twenty.
        root = lax.rsqrt(1.0 + jnp.exp(-gate))
        sigmoid = root * root
        if plan.epilogue == "swiglu":
            return [gate * sigmoid * up]
        if plan.epilogue == "swiglu_keep":
            return [gate * sigmoid * up, *products]
        (d_act,) = tail
        d_gate = d_act * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        act = [gate * sigmoid * up] if plan.epilogue == "swiglu_back" else []
        return [d_gate, d_act * gate * sigmoid, *act]

    def scaled(self, part, column, j: int):
        """Returns one piece of each product times its factors, if the plan has any."""
        if not self.plan.factors:
            return part
        factors = [self.along_columns(index, column, j) for index in self.plan.factors]
        return [f * v for f, v in zip(factors, part, strict=True)]

    def along_columns(self, index: int, column, j: int):
        """Returns a vector's elements of the columns of one piece, for all its rows, float32."""
        width = self.config.store_n
        n0 = column * self.plan.tile_n + j * width
        vector = plgpu.load(self.refs[index].at[pl.ds(n0, width)], optimized=False)
        return lax.broadcast_in_dim(vector.astype(jnp.float32), (64, width), (1,))

    def tail_slot(self, count, j: int):
        """Returns the slot with the tail's part of the piece of columns `j`."""
        return self.slot(count + j)

    def tail(self, count, i: int, j: int):
        """Returns one piece of each of the tail's arrays, float32."""
        rows = pl.ds(self.warpgroup * self.plan.warpgroup_m + i * 64, 64)
        places = self.tail_places(self.tail_slot(count, j))[: len(self.plan.tail)]
        return [place[rows, :].astype(jnp.float32) for place in places]

    def dropped(self, at, count, i: int, j: int):
        """Returns the dropped term's part of one piece, ``mask ∘ (lhs·rhs) / keep``."""
        plan = self.plan
        width = self.config.store_n
        rows = pl.ds(self.warpgroup * plan.warpgroup_m + i * 64, 64)

        def multiply(accumulator):
            if plan.update is not None:
                columns = self.short_rhs.at[:, pl.ds(j * width, width)]
                plgpu.wgmma(accumulator, self.short_rows(i * 64, 64), columns)
            for step in range(plan.masked_steps):
                slot = self.slot(count + step)
                columns = self.rhs.at[0, slot].at[pl.ds(j * width, width)]
                lhs = self.lhs.at[slot].at[rows]
                plgpu.wgmma(accumulator, lhs, columns.transpose((1, 0)))
            return accumulator[...]

        product = pl.run_scoped(multiply, plgpu.ACC((64, width), jnp.float32))
        assert plan.seed is not None
        seed = self.refs[plan.seed]
        keep = tile_mask(seed, at, product.shape, plan.rate)
        return jnp.where(keep, product * (1.0 / keep_probability(plan.rate)), 0.0)

    def copy_out(self, value, at, column, output: int, piece: int) -> None:
        """Stages one piece and copies it to its place in an output."""
        plan = self.plan
        c = self.config
        slots = plan.staging_slots
        slot = piece % slots
        # The copy that used this buffer last must have read it.
        plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
        self.staging[self.warpgroup, slot] = value.astype(self.staging.dtype)
        plgpu.commit_smem()
        place = (pl.ds(at[0], 64), pl.ds(at[1], c.store_n))

        def copy(group: int) -> None:
            destination = self.outputs[group * plan.writes + output]
            plgpu.copy_smem_to_gmem(self.staging.at[self.warpgroup, slot], destination.at[*place])

        plan.for_each_group(column, copy)
