"""Calls and gradients of the operations: on rows, per shard, forward and backward.

The gradient is defined once for every implementation, with ``dy`` the cotangent of the result,
``d`` the dropout and ``g = scale · dy·bᵀ``::

    dx = dy·wᵀ + d'(g·aᵀ)      da = d(x)ᵀ·g      db = scale · (d(x)·a)ᵀ·dy

Where a member has a factor f, ``f∘dy`` is in the place of its dy, and ``df = Σ_rows dy∘u`` with u
the product that f multiplies, which is kept for this. Of gate and up it is kept instead of
their outputs, which no one reads.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from lorax_kernels.dispatch import axis_sizes, explicit_rows
from lorax_kernels.lora_linear import xla
from lorax_kernels.lora_linear.dropout import seed_words
from lorax_kernels.lora_linear.weights import Group, LoraWeights

KERNEL_ROWS = 16  # fewer rows, or a number that is no multiple of 8, are padded to this multiple


def run(
    x: jax.Array,
    groups: Sequence[Sequence[LoraWeights]],
    rate: float,
    keys: Sequence[Any],
    row_axes: Sequence[str],
    function: Callable[..., Any],
    implementation: str,
    residual: jax.Array | None = None,
) -> list[jax.Array]:
    """Calls `function` on rows, under a mesh once per shard of them.

    Args:
        x: Input.
        groups: The layers that read `x`, and those that read their output.
        rate: Dropout rate.
        keys: Dropout key of each group.
        row_axes: Mesh axes that divide the rows.
        function: ``function(x, *groups, residual)``.
        implementation: ``pallas`` or ``xla``.
        residual: Added to the one output.
    """
    axes = tuple(axis_sizes(row_axes)) if implementation == "pallas" else ()
    operands = [
        Group.of(members, rate, key, implementation, axes)
        for members, key in zip(groups, keys, strict=True)
    ]

    def local(x, operands, residual):
        batch = x.shape[:-1]
        m = math.prod(batch)
        padding = (
            -m % KERNEL_ROWS if implementation == "pallas" and (m % 8 or m < KERNEL_ROWS) else 0
        )

        def flat(v):
            return jnp.pad(v.reshape(m, v.shape[-1]), ((0, padding), (0, 0)))

        outputs = function(flat(x), *operands, jax.tree.map(flat, residual))
        return [y[:m].reshape(*batch, y.shape[1]) for y in outputs]

    sharded: Callable[..., Any] = local
    if axes:
        rows = PartitionSpec(axes)
        # Without shard_map the compiler would gather every operand and run the kernel whole on each
        # device. The gradients of a and b are summed over the shards, as they enter unsharded.
        specs = (rows, PartitionSpec(), rows)
        sharded = jax.shard_map(local, in_specs=specs, out_specs=rows, check_vma=False)
    if (rows := explicit_rows(x)) is not None:
        sharded = jax.sharding.auto_axes(sharded, out_sharding=rows)
    return sharded(x, operands, residual)


def _kernel_dropout(x, group: Group):
    """Returns the dropout as the kernels take it; rows are numbered across the shards."""
    from lorax_kernels.lora_linear.plan import Dropout

    if group.key is None:
        return None
    row = jnp.uint32(0)
    if group.axes:
        row = jax.lax.axis_index(group.axes).astype(jnp.uint32) * jnp.uint32(x.shape[0])
    return Dropout(jnp.concatenate([seed_words(group.key), row[None]]), group.rate)


def _named(saved):
    """Names h for a policy of `jax.checkpoint`: it is small, and storing it saves a matmul."""
    return saved and saved._replace(h=checkpoint_name(saved.h, "lora_h"))


def _forward(
    x, group: Group, residual=None, *, keep: bool = False
) -> tuple[list[jax.Array], list[jax.Array], Any]:
    """Returns the outputs of a group, its products, and more for the backward pass, without x.

    The products are what factors multiply, with `keep` and if a member has one: otherwise none.
    """
    group, x = group.computed_after(x)
    if group.is_kernel:
        keep = keep and group.has_factors
        outputs, products, saved = _kernel_forward(keep, x, group, residual)
        return outputs, products, _named(saved)
    return xla.forward(x, group.multiplied_in(x.dtype), residual)


# Compiled functions of their own, so that equal layers are lowered and compiled once.
@functools.partial(jax.jit, static_argnums=0)
def _kernel_forward(keep: bool, x, group: Group, residual):
    from lorax_kernels.lora_linear import fused

    dropout = _kernel_dropout(x, group)
    return fused.forward(x, group.multiplied_in(x.dtype), dropout, residual, keep)


@jax.jit
def _kernel_backward(x, group: Group, saved, dys, gate_up=(), factors=()):
    from lorax_kernels.lora_linear import fused

    dropout = _kernel_dropout(dys[0], group)
    group = group.multiplied_in(dys[0].dtype)
    return fused.backward(x, saved, group, dropout, dys, gate_up, factors)


def _backward(x, group: Group, saved, dys, of_factors, gate_up=(), factors=()):
    """Returns the gradients of x, of the group, and of `factors`.

    Where x is ``silu(gate)·up`` and `gate_up` holds the two before their `factors`, it returns
    their gradients instead of x's, and x may be None.

    Args:
        x: Input, or None.
        group: The members.
        saved: As `_forward` returned it.
        dys: Gradients of the members' products.
        of_factors: Gradients of the members' factors, for the group's.
        gate_up: Gate and up.
        factors: Their factors, each or None.
    """
    again, dys = group.without_factors().computed_after(dys)
    if group.is_kernel:
        dxs, da, db, more = _kernel_backward(x, again, saved, dys, gate_up, factors)
    else:

        def pull(dx):
            return dx, factors

        if gate_up:
            x, pull = jax.vjp(xla.swiglu, *gate_up, factors)
        dx, da, db = xla.backward(x, saved, again.multiplied_in(dys[0].dtype), dys)
        *dxs, more = pull(dx)

    def like(gradients, leaves):
        return [
            leaf if leaf is None else gradient.astype(leaf.dtype)
            for gradient, leaf in zip(gradients, leaves, strict=True)
        ]

    own = {"a": like(da, group.a), "b": like(db, group.b)}
    own |= {"factors": like(of_factors, group.factors)}
    frozen: dict[str, Any] = dict.fromkeys(("w", "biases", "key"))
    return list(dxs), dataclasses.replace(group, **own, **frozen), more


@jax.custom_vjp
def apply_group(x, group: Group, residual) -> list[jax.Array]:
    """Returns the outputs of a group's members on rows; `residual` is added to a single output."""
    return _forward(x, group, residual)[0]


def _group_forward(x, group: Group, residual):
    outputs, products, saved = _forward(x, group, residual, keep=True)
    return outputs, (x, group, saved, products, _mark(residual))


def _group_backward(residuals, dys):
    x, group, saved, products, marked = residuals
    own, of_factors = xla.through_factors(group.factors, products, dys)
    (dx,), of_group, _ = _backward(x, group, saved, own, of_factors)
    return dx, of_group, _of_residual(marked, dys)


def _mark(residual):
    """Returns a marker, without an array, of whether there is a residual."""
    return None if residual is None else ()


def _of_residual(marked, dys):
    return None if marked is None else dys[0]


apply_group.defvjp(_group_forward, _group_backward)


def _swiglu(x, group: Group, *, keep: bool):
    """Returns ``[silu(gate(x))·up(x)]`` and what is saved.

    With `keep` the former has gate(x) and up(x) before their factors too.
    """
    if group.is_kernel:
        group, x = group.computed_after(x)
        outputs, saved = _swiglu_kernel("swiglu_keep" if keep else "swiglu", x, group)
        return outputs, _named(saved)
    (gate, up), _, saved = _forward(x, group.without_factors())
    kept = [gate, up] if keep else []
    return [xla.swiglu(gate, up, group.factors), *kept], saved


@functools.partial(jax.jit, static_argnums=0)
def _swiglu_kernel(epilogue, x, group: Group):
    from lorax_kernels.lora_linear import fused

    dropout = _kernel_dropout(x, group)
    group = group.multiplied_in(x.dtype)
    if not group.ranks:
        return fused.swiglu(x, None, None, group, epilogue), None
    packed = fused.pack(group, fused.lay_out(group), x.dtype)
    h = fused.down_project(x, packed[0], dropout)
    return fused.swiglu(x, h, packed[1], group, epilogue), fused.Saved(h, *packed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def apply_swiglu(recompute: bool, x, group: Group, _) -> list[jax.Array]:
    """Returns ``[silu(gate(x))·up(x)]``.

    The backward pass reads stored gate(x) and up(x), before their factors, or, with `recompute`,
    recomputes them.
    """
    return _swiglu(x, group, keep=False)[0]


def _swiglu_forward(recompute: bool, x, group: Group, _):
    (act, *kept), saved = _swiglu(x, group, keep=not recompute)
    return [act], (x, group, saved, kept)


def _swiglu_backward(recompute: bool, residuals, cotangents):
    x, group, saved, kept = residuals
    (d_act,) = cotangents
    again, d_act = group.computed_after(d_act) if recompute else (group, d_act)
    if recompute and group.is_kernel and not group.has_factors:
        dys = _swiglu_gradients(x, again, saved, d_act)
        of_factors = group.factors
    else:
        if recompute:
            kept = _recomputed(x, again.without_factors(), saved)
        *dys, of_factors = jax.vjp(xla.swiglu, *kept, group.factors)[1](d_act)
    (dx,), of_group, _ = _backward(x, group, saved, dys, of_factors)
    return dx, of_group, None


@jax.jit
def _swiglu_gradients(x, group: Group, saved, d_act):
    from lorax_kernels.lora_linear import fused

    h, packed_b = (saved.h, saved.b) if saved else (None, None)
    return fused.swiglu(x, h, packed_b, group.multiplied_in(x.dtype), "swiglu_grad", [d_act])


def _recomputed(x, group: Group, saved):
    """Returns the outputs of a group whose forward pass returned `saved`."""
    if not group.is_kernel:
        return _forward(x, group)[0]
    group, x = group.computed_after(x)
    return _multiply(x, group, saved)


apply_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def apply_mlp(repeated: bool, x, gate_up: Group, down: Group, residual) -> list[jax.Array]:
    """Returns ``[down(silu(gate(x))·up(x))]``, added to `residual`.

    The backward pass reads stored gate(x) and up(x), before their factors, and recomputes the inner
    product from them.
    Under a `jax.checkpoint` that recomputes all of it (`repeated`), each pass writes only what it
    needs: the first one the inner product, the second one gate(x) and up(x).
    """
    (act,), _ = _swiglu(x, gate_up, keep=False)
    return _forward(act, down, residual)[0]


def _mlp_forward(repeated: bool, x, gate_up: Group, down: Group, residual):
    apart = repeated and gate_up.is_kernel
    (act, *kept), saved = _swiglu(x, gate_up, keep=not apart)
    if apart:
        kept = _recomputed(x, gate_up.without_factors(), saved)
    outputs, products, saved_of_down = _forward(act, down, residual, keep=True)
    of_gate_up = (gate_up, saved, kept)
    return outputs, (x, of_gate_up, (down, saved_of_down, products), _mark(residual))


@jax.jit
def _multiply(x, group: Group, saved):
    from lorax_kernels.lora_linear import fused

    return fused.multiply(x, saved, group.multiplied_in(x.dtype))[0]


def _mlp_backward(repeated: bool, residuals, dys):
    x, (gate_up, saved, kept), (down, saved_of_down, products), marked = residuals
    own, of_factor = xla.through_factors(down.factors, products, dys)
    d_kept, of_down, of_factors = _backward(
        None, down, saved_of_down, own, of_factor, tuple(kept), tuple(gate_up.factors)
    )
    (dx,), of_gate_up, _ = _backward(x, gate_up, saved, d_kept, of_factors)
    return dx, of_gate_up, of_down, _of_residual(marked, dys)


apply_mlp.defvjp(_mlp_forward, _mlp_backward)
