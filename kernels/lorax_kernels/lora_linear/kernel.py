"""The matmul behind `lora_linear` on Hopper, in Pallas's Mosaic GPU.

One persistent kernel computes, for every group g of output columns,

    y_g = Σ_t lhs_t · rhs_t        (bf16 or fp16 operands, float32 sums, one rounding)

The terms of a group run one after another through the same ring of shared memory, as more steps of
one contraction. So ``x·W0 + h·B`` is one matmul that is r columns longer, the members of a group
share one launch, and the backward pass ``Σ_g dy_g·W_gᵀ + g·Aᵀ`` is one matmul too. Ragged edges
cost nothing: the copy engine reads zeros outside an array and drops writes there.

See `roles.py` for the parts of the warpgroups.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from lorax_kernels.lora_linear.memory import swizzled_memory
from lorax_kernels.lora_linear.plan import (
    EPILOGUE_ARRAYS,
    RANK,
    SHARED_MEMORY_BYTES,
    STEP,
    Dropout,
    Epilogue,
    MatmulConfig,
    PlacedTerm,
    Plan,
    Term,
    Update,
    fits,
    place,
)
from lorax_kernels.lora_linear.roles import Feeder, Multiplier
from lorax_kernels.lora_linear.warpgroups import divide, launch


def grouped_matmul(
    groups: Sequence[Sequence[Term]],
    *,
    config: MatmulConfig,
    transposed: bool = False,
    epilogue: Epilogue = "store",
    bias: jax.Array | None = None,
    tail: Sequence[jax.Array] = (),
    update: Update | None = None,
    dropout: Dropout | None = None,
    begun: tuple[Sequence[jax.Array], int] | None = None,
    factors: Sequence[jax.Array] = (),
    keep: bool = False,
    sms: int | None = None,
) -> list[jax.Array]:
    """Computes ``y_g = (factor_g ·) Σ_t lhs_t · rhs_t (+ bias_g)`` for every group in one launch.

    Args:
        groups: The terms of each output.
        config: The tiling of the matmul.
        transposed: Whether each right operand is (n, k) and read as its transpose, in place.
        epilogue: ``store`` writes the sums; ``add`` that of one group, added to an array. Three
            take gate and up as two right operands:
            ``swiglu`` writes ``silu(gate)·up``; ``swiglu_keep`` writes that, gate and up;
            ``swiglu_grad`` writes the gradients of gate and up. ``swiglu_back`` writes them over
            gate and up, where the sum, of one group, is the gradient of ``silu(gate)·up``, and
            then that product.
        bias: One vector for all groups, each group's part padded to whole tiles.
        tail: Arrays that an epilogue reads, each (m, n): the addend of ``add``, the gradient of
            ``silu(gate)·up`` for ``swiglu_grad``, gate and up for ``swiglu_back``.
        update: A matmul of rank 16 to add to all groups.
        dropout: Drops the update, or without one the last term, of a transposed matmul of one
            group.
        begun: The first group's results, and the number of their first columns that are computed,
            in whole tiles; the rest is written into them.
        factors: Of columns, float32, laid out as `bias`: one vector for all groups, or for
            three one for gate and one for up. ``swiglu_keep`` writes both before their factors.
            ``swiglu_back`` reads them so, and writes the gradients of what the factors give, beside
            gate and up. ``swiglu_grad`` takes none.
        keep: Whether to write each group's product before its factor too.
        sms: CTAs to launch; None asks the device.

    Returns:
        One (m, n) array per group, each followed by its product with `keep`, or the epilogue's
        arrays.
    """
    arrays: list[jax.Array] = []
    number = functools.partial(place, arrays)
    contraction, free = (1, 0) if transposed else (0, 1)
    widths = tuple(group[0].rhs[0].shape[free] for group in groups)
    in_place = epilogue == "swiglu_back" and not factors

    def placed(term: Term) -> PlacedTerm:
        k = term.k or term.rhs[0].shape[contraction]
        rhs = tuple(number(w) for w in term.rhs)
        return PlacedTerm(number(term.lhs), rhs, k, term.column, term.row, term.columns)

    terms = tuple(tuple(placed(term) for term in group) for group in groups)
    plan = Plan(
        config=config,
        epilogue=epilogue,
        transposed=transposed,
        rate=dropout.rate if dropout else 0.0,
        m=groups[0][0].lhs.shape[0],
        columns=widths,
        terms=terms,
        masked_steps=-(-terms[0][-1].k // STEP) if dropout and not update else 0,
        seed=number(dropout.seed) if dropout else None,
        bias=None if bias is None else number(bias),
        tail=(-3, -2) if in_place else tuple(number(array) for array in tail),
        outputs=len(groups) * (EPILOGUE_ARRAYS[epilogue][1] + keep),
        update=(number(update.lhs), number(update.rhs)) if update else None,
        skipped=begun[1] // config.block_n if begun else 0,
        factors=tuple(number(factor) for factor in factors),
        keep=keep,
    )
    dtype = groups[0][0].lhs.dtype
    _check(plan, dtype)
    into = list(begun[0]) if begun else list(tail) if in_place else []
    return _launch(plan, dtype, into, arrays, sms)


def _launch(plan: Plan, dtype, into, arrays, sms: int | None) -> list[jax.Array]:
    """Runs the kernel, which writes its first results into the arrays `into`."""
    shapes = [(plan.m, n) for n in plan.columns for _ in range(plan.writes)]
    outputs = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes[len(into) :]]
    scratch = _short_step_memory(plan.config, dtype) if plan.update else {}
    kernel = launch_roles(Feeder, Multiplier, plan, dtype, outputs, sms=sms, **scratch)
    return _write_into(kernel, into, arrays)


def _write_into(kernel, into: list[jax.Array], arrays: list[jax.Array]) -> list[jax.Array]:
    """Runs a kernel that writes into some arrays, and returns these before the kernel's results."""
    if not into:
        return list(kernel(*arrays))

    # `jax.checkpoint` drops a kernel whose only result is written into a reference. It does not
    # look into this function, whose results are plain arrays.
    @jax.custom_batching.custom_vmap
    def whole(into, arrays):
        refs = [jax.new_ref(array) for array in into]
        rest = kernel(*arrays, *refs)
        return [*(jax.freeze(ref) for ref in refs), *rest]

    @whole.def_vmap
    def _refuse(*_):
        raise NotImplementedError("lora_linear's kernels cannot be vmapped: put rows side by side")

    return whole(into, arrays)


def _short_step_memory(config: MatmulConfig, dtype) -> dict[str, Any]:
    # The tensor cores need both operands in one swizzle, that of the short rows of lhs.
    box = functools.partial(swizzled_memory, dtype=dtype, minor=RANK)
    return {
        "short_lhs": box((config.block_m, RANK)),
        "short_rhs": box((RANK, config.block_n)),
        "short_full": plgpu.Barrier(num_arrivals=2),
        "short_empty": plgpu.Barrier(num_arrivals=2),
    }


def _check(plan: Plan, dtype) -> None:
    c = plan.config
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"the kernel takes bfloat16 and float16 operands, got {dtype}")
    if c.block_m not in (128, 256) or c.block_n % 64 or plan.tile_n % c.store_n:
        raise ValueError(f"{c} has no tile that the matrix units take")
    if not fits(c, short=plan.update is not None):
        raise ValueError(f"{c} needs more than {SHARED_MEMORY_BYTES - 1024} bytes of shared memory")
    if plan.epilogue != "store" and len(plan.columns) > 1:
        raise ValueError(f"{plan.epilogue} takes one group, got {len(plan.columns)}")
    if plan.factors and plan.epilogue == "swiglu_grad":
        raise ValueError(f"{plan.epilogue} takes no factors")
    if plan.tail and plan.masked_steps:
        raise ValueError(f"{plan.epilogue} leaves no slot of the ring for a dropped term")
    if plan.masked_steps > c.stages:
        raise ValueError(f"rank over {c.stages * STEP} with dropout does not fit the ring")
    if plan.epilogue != "store" and len(plan.tail) != EPILOGUE_ARRAYS[plan.epilogue][0]:
        raise ValueError(f"{plan.epilogue} reads {EPILOGUE_ARRAYS[plan.epilogue][0]} arrays")
    if plan.tail and c.store_n != STEP:
        raise ValueError(f"{plan.epilogue} stores {STEP} columns at a time, not {c.store_n}")
    if len(plan.tail) > 1 and not (plan.transposed and c.block_m <= plan.tile_n):
        raise ValueError(f"{c} has no room for what {plan.epilogue} reads")


def launch_roles(
    feeder: type[Feeder],
    multiplier: type[Multiplier],
    plan: Plan,
    dtype,
    outputs,
    *,
    sms: int | None,
    **scratch,
):
    """Returns a function that runs the two roles, with a ring and staging buffers.

    Args:
        feeder: The role of the feeding warpgroup.
        multiplier: The role of the multiplying ones.
        plan: The kernel's plan.
        dtype: Dtype of the operands.
        outputs: Types of the results.
        sms: CTAs; None asks the device.
        **scratch: More shared memory and barriers.
    """
    c = plan.config
    rhs_tile = (plan.tile_n, STEP) if plan.transposed else (STEP, plan.tile_n)
    swizzled = functools.partial(swizzled_memory, dtype=dtype)
    empty: Any = plgpu.Barrier(num_arrivals=2, num_barriers=c.stages)
    if c.cluster > 1:
        # A slot is free when the warpgroups of every CTA that its copy writes to have read it.
        empty = plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=2, num_barriers=c.stages
        )

    def body(*refs, **memory):
        def feed():
            return feeder(plan, refs, **memory).run()

        def multiply():
            return multiplier(plan, refs, **memory).run()

        divide(feed, multiply, plan.registers)

    memory = {
        "lhs": swizzled((c.stages, c.block_m, STEP)),
        "rhs": swizzled((plan.halves, c.stages, *rhs_tile)),
        "staging": swizzled((2, c.store_slots, 64, c.store_n)),
        "full": plgpu.Barrier(num_arrivals=plan.copies, num_barriers=c.stages),
        "empty": empty,
        **scratch,
    }
    return launch(body, plan.name, outputs, memory, sms, c.cluster)
