"""How the operations are called and differentiated: on rows, per shard, forward and backward.

The gradient is defined once for every implementation, with ``dy`` the cotangent of the result,
``d`` the dropout and ``g = scale · dy·bᵀ``::

    dx = dy·wᵀ + d'(g·aᵀ)      da = d(x)ᵀ·g      db = scale · (d(x)·a)ᵀ·dy
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

from lorax_kernels.lora_linear import choice, xla
from lorax_kernels.lora_linear.dropout import seed_words
from lorax_kernels.lora_linear.weights import Group, LoraWeights

KERNEL_ROWS = 16  # fewer rows, or a number that is no multiple of 8, are padded to this multiple


@dataclasses.dataclass(frozen=True)
class _Static:
    """What `apply_group` and `apply_swiglu` know at trace time."""

    members: tuple[int, ...]
    scales: tuple[float, ...]
    rate: float
    implementation: str
    axes: tuple[str, ...]  # of the mesh, where the kernel runs inside shard_map


def run(
    inputs: tuple[jax.Array, jax.Array | None],
    members: Sequence[LoraWeights],
    rate: float,
    key,
    row_axes,
    which: Sequence[int],
    function: Callable[..., Any],
    implementation: str,
) -> list[jax.Array]:
    """Calls `function` on the chosen members, under a mesh once per shard of the rows.

    Args:
        inputs: x, and x for the backward pass if it is to read another.
        members: Those of the whole call.
        rate: Of the dropout.
        key: Of the dropout.
        row_axes: Mesh axes that divide the rows.
        which: The members to call with.
        function: `apply_group`, or `apply_swiglu` with its mode.
        implementation: ``pallas`` or ``xla``.
    """
    chosen = [members[i] for i in which]
    updated = [i for i, member in enumerate(chosen) if member.a is not None]
    axes = tuple(choice.axis_sizes(row_axes)) if implementation == "pallas" else ()
    static = _Static(
        tuple(updated),
        tuple(float(chosen[i].scale) for i in updated),
        rate,
        implementation,
        axes,
    )
    operands = (
        [member.w for member in chosen],
        [member.bias for member in chosen],
        [chosen[i].a for i in updated],
        [chosen[i].b for i in updated],
        key if rate else None,
    )

    def local(inputs, *operands):
        *batch, k = inputs[0].shape
        m = math.prod(batch)
        padding = (
            -m % KERNEL_ROWS if implementation == "pallas" and (m % 8 or m < KERNEL_ROWS) else 0
        )
        rows = lambda x: jnp.pad(x.reshape(m, k), ((0, padding), (0, 0)))
        outputs = function(static, jax.tree.map(rows, inputs), *operands)
        return [y[:m].reshape(*batch, y.shape[1]) for y in outputs]

    if not axes:
        return local(inputs, *operands)
    rows = PartitionSpec(axes)
    # Without shard_map the compiler would gather every operand and run the kernel whole on each
    # device. The gradients of a and b are summed over the shards, as they enter unsharded.
    specs = jax.tree.map(lambda _: PartitionSpec(), operands)
    sharded = jax.shard_map(local, in_specs=(rows, *specs), out_specs=rows, check_vma=False)
    return sharded(inputs, *operands)


def _bundle(static: _Static, dtype, w, biases, a, b) -> Group:
    w = [weight.astype(dtype) for weight in w]
    return Group(w, biases, static.members, a, b, static.scales)


def _kernel_dropout(static: _Static, x, key):
    """Returns the dropout as the kernels take it; rows are numbered across the shards."""
    from lorax_kernels.lora_linear.plan import Dropout

    if not static.rate:
        return None
    row = jnp.uint32(0)
    if static.axes:
        row = jax.lax.axis_index(static.axes).astype(jnp.uint32) * jnp.uint32(x.shape[0])
    return Dropout(jnp.concatenate([seed_words(key), row[None]]), static.rate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def apply_group(static: _Static, inputs, w, biases, a, b, key) -> list[jax.Array]:
    """Returns the outputs of a group's members on rows."""
    return _forward(static, inputs, w, biases, a, b, key)[0]


def _forward(static: _Static, inputs, w, biases, a, b, key):
    x, again = inputs
    if static.implementation == "pallas":
        outputs, saved = _kernel_forward(static, x, w, biases, a, b, key)
    else:
        group = _bundle(static, x.dtype, w, biases, a, b)
        outputs, saved = xla.forward(x, group, static.rate, key)
    return outputs, (x if again is None else again, w, biases, a, b, key, _named(saved))


def _named(saved):
    """Names h for a policy of `jax.checkpoint`: it is small, and saves what it came from."""
    if isinstance(saved, jax.Array):
        return checkpoint_name(saved, "lora_h")
    return saved and saved._replace(h=checkpoint_name(saved.h, "lora_h"))


# Compiled functions of their own, so that equal layers are lowered and compiled once.
@functools.partial(jax.jit, static_argnums=0)
def _kernel_forward(static: _Static, x, w, biases, a, b, key):
    from lorax_kernels.lora_linear import fused

    group = _bundle(static, x.dtype, w, biases, a, b)
    return fused.forward(x, group, _kernel_dropout(static, x, key))


@functools.partial(jax.jit, static_argnums=0)
def _kernel_backward(static: _Static, x, w, biases, a, b, key, saved, dys):
    from lorax_kernels.lora_linear import fused

    group = _bundle(static, x.dtype, w, biases, a, b)
    return fused.backward(x, saved, group, _kernel_dropout(static, x, key), dys)


def _backward(static: _Static, residuals, dys):
    x, w, biases, a, b, key, saved = residuals
    if static.implementation == "pallas":
        dx, da, db = _kernel_backward(static, x, w, biases, a, b, key, saved, dys)
    else:
        group = _bundle(static, x.dtype, w, biases, a, b)
        dx, da, db = xla.backward(x, saved, group, static.rate, key, dys)
    da = [gradient.astype(leaf.dtype) for gradient, leaf in zip(da, a, strict=True)]
    db = [gradient.astype(leaf.dtype) for gradient, leaf in zip(db, b, strict=True)]
    return (dx, None), None, None, da, db, None


apply_group.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def apply_swiglu(mode: str, static: _Static, inputs, w, biases, a, b, key) -> list[jax.Array]:
    """Returns ``silu(gate(x))·up(x)`` and, in the mode ``show``, gate(x) and up(x).

    The backward pass finds gate(x) and up(x) in memory, or in the mode ``recompute`` makes them.
    """
    if mode == "show":
        return _swiglu_forward(mode, static, inputs, w, biases, a, b, key)[0]
    x = inputs[0]
    group = _bundle(static, x.dtype, w, biases, a, b)
    if static.implementation == "xla":
        outputs, _ = xla.forward(x, group, static.rate, key)
        return [xla.swiglu(*outputs)]
    return _swiglu_kernel(static, "swiglu", x, w, biases, a, b, key)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _swiglu_kernel(static: _Static, epilogue, x, w, biases, a, b, key):
    from lorax_kernels.lora_linear import fused

    group = _bundle(static, x.dtype, w, biases, a, b)
    if not group.ranks:
        return fused.swiglu(x, None, None, group, epilogue), None
    packed = fused.pack(group, fused.lay_out(group), x.dtype)
    h = fused.down_project(x, packed[0], _kernel_dropout(static, x, key))
    return fused.swiglu(x, h, packed[1], group, epilogue), fused.Saved(h, *packed)


def _swiglu_forward(mode: str, static: _Static, inputs, w, biases, a, b, key):
    x = inputs[0]
    if static.implementation == "xla":
        group = _bundle(static, x.dtype, w, biases, a, b)
        kept, saved = xla.forward(x, group, static.rate, key)
        act = xla.swiglu(*kept)
    else:
        epilogue = "swiglu" if mode == "recompute" else "swiglu_keep"
        (act, *kept), saved = _swiglu_kernel(static, epilogue, x, w, biases, a, b, key)
    outputs = [act, *kept] if mode == "show" else [act]
    kept = None if mode == "recompute" else kept
    return outputs, (x, w, biases, a, b, key, _named(saved), kept)


def _swiglu_backward(mode: str, static: _Static, residuals, cotangents):
    x, w, biases, a, b, key, saved, kept = residuals
    d_act = cotangents[0]  # what is shown beside it has no gradient
    group = _bundle(static, x.dtype, w, biases, a, b)
    if mode == "recompute" and static.implementation == "pallas":
        dys = _swiglu_gradients(static, x, w, biases, a, b, saved, d_act)
    else:
        if kept is None:
            kept, _ = xla.forward(x, group, static.rate, key)
        dys = jax.vjp(xla.swiglu, *kept)[1](d_act)
    return _backward(static, (x, w, biases, a, b, key, saved), list(dys))


@functools.partial(jax.jit, static_argnums=0)
def _swiglu_gradients(static: _Static, x, w, biases, a, b, saved, d_act):
    from lorax_kernels.lora_linear import fused

    group = _bundle(static, x.dtype, w, biases, a, b)
    h, packed_b = (saved.h, saved.b) if saved else (None, None)
    return fused.swiglu(x, h, packed_b, group, "swiglu_grad", d_act)


apply_swiglu.defvjp(_swiglu_forward, _swiglu_backward)
