"""How the operations are called and differentiated: on rows, per shard, forward and backward.

The gradient is defined once for every implementation, with ``dy`` the cotangent of the result,
``d`` the dropout and ``g = scale · dy·bᵀ``::

    dx = dy·wᵀ + d'(g·aᵀ)      da = d(x)ᵀ·g      db = scale · (d(x)·a)ᵀ·dy
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from lorax_kernels.lora_linear import choice, xla
from lorax_kernels.lora_linear.dropout import seed_words
from lorax_kernels.lora_linear.weights import Group, LoraWeights

KERNEL_ROWS = 16  # fewer rows, or a number that is no multiple of 8, are padded to this multiple


@dataclasses.dataclass(frozen=True)
class Static:
    """What an operation knows of a group at trace time."""

    members: tuple[int, ...]
    scales: tuple[float, ...]
    rate: float
    implementation: str
    axes: tuple[str, ...]  # of the mesh, where the kernel runs inside shard_map

    @property
    def is_kernel(self) -> bool:
        """Says whether the kernels run, instead of XLA."""
        return self.implementation == "pallas"


class Operands(NamedTuple):
    """The arrays of a group: see `weights.Group`, and the key of its dropout."""

    w: Any
    biases: Any
    a: Any
    b: Any
    key: Any


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
        groups: The layers that read `x`, and those that read what these make.
        rate: Of the dropout.
        keys: Of each group's dropout.
        row_axes: Mesh axes that divide the rows.
        function: ``function(one Static per group, x, one Operands per group, residual)``.
        implementation: ``pallas`` or ``xla``.
        residual: What the one output is added to.
    """
    axes = tuple(choice.axis_sizes(row_axes)) if implementation == "pallas" else ()
    statics, operands = [], []
    for members, key in zip(groups, keys, strict=True):
        updated = tuple(i for i, member in enumerate(members) if member.a is not None)
        scales = tuple(float(members[i].scale) for i in updated)
        own_rate = rate if updated else 0.0
        statics.append(Static(updated, scales, own_rate, implementation, axes))
        of = lambda name, which, members=members: [getattr(members[i], name) for i in which]
        everyone = range(len(members))
        a, b = of("a", updated), of("b", updated)
        operands.append(
            Operands(of("w", everyone), of("bias", everyone), a, b, key if own_rate else None)
        )

    def local(x, operands, residual):
        batch = x.shape[:-1]
        m = math.prod(batch)
        padding = (
            -m % KERNEL_ROWS if implementation == "pallas" and (m % 8 or m < KERNEL_ROWS) else 0
        )
        flat = lambda v: jnp.pad(v.reshape(m, v.shape[-1]), ((0, padding), (0, 0)))
        outputs = function(tuple(statics), flat(x), *operands, jax.tree.map(flat, residual))
        return [y[:m].reshape(*batch, y.shape[1]) for y in outputs]

    if not axes:
        return local(x, operands, residual)
    rows = PartitionSpec(axes)
    # Without shard_map the compiler would gather every operand and run the kernel whole on each
    # device. The gradients of a and b are summed over the shards, as they enter unsharded.
    specs = (rows, PartitionSpec(), rows)
    sharded = jax.shard_map(local, in_specs=specs, out_specs=rows, check_vma=False)
    return sharded(x, operands, residual)


def _bundle(static: Static, dtype, operands: Operands) -> Group:
    w, biases, a, b, _ = operands
    w = [weight.astype(dtype) for weight in w]
    return Group(w, biases, static.members, a, b, static.scales)


def _kernel_dropout(static: Static, x, operands: Operands):
    """Returns the dropout as the kernels take it; rows are numbered across the shards."""
    from lorax_kernels.lora_linear.plan import Dropout

    if not static.rate:
        return None
    row = jnp.uint32(0)
    if static.axes:
        row = jax.lax.axis_index(static.axes).astype(jnp.uint32) * jnp.uint32(x.shape[0])
    return Dropout(jnp.concatenate([seed_words(operands.key), row[None]]), static.rate)


def _named(saved):
    """Names h for a policy of `jax.checkpoint`: it is small, and saves what it came from."""
    return saved and saved._replace(h=checkpoint_name(saved.h, "lora_h"))


def _forward(static: Static, x, operands: Operands, residual=None) -> tuple[list[jax.Array], Any]:
    """Returns the outputs of a group, and what its backward pass needs besides x."""
    if static.is_kernel:
        outputs, saved = _kernel_forward(static, x, operands, residual)
        return outputs, _named(saved)
    group = _bundle(static, x.dtype, operands)
    return xla.forward(x, group, static.rate, operands.key, residual)


# Compiled functions of their own, so that equal layers are lowered and compiled once.
@functools.partial(jax.jit, static_argnums=0)
def _kernel_forward(static: Static, x, operands: Operands, residual):
    from lorax_kernels.lora_linear import fused

    group = _bundle(static, x.dtype, operands)
    return fused.forward(x, group, _kernel_dropout(static, x, operands), residual)


@functools.partial(jax.jit, static_argnums=0)
def _kernel_backward(static: Static, x, operands: Operands, saved, dys, gate_up=()):
    from lorax_kernels.lora_linear import fused

    group = _bundle(static, dys[0].dtype, operands)
    return fused.backward(x, saved, group, _kernel_dropout(static, dys[0], operands), dys, gate_up)


def _backward(static: Static, x, operands: Operands, saved, dys, gate_up=()):
    """Returns the gradients of x, and of the operands.

    Where x is ``silu(gate)·up`` and `gate_up` holds the two, theirs come instead of x's, and x may
    be None.
    """
    if static.is_kernel:
        dxs, da, db = _kernel_backward(static, x, operands, saved, dys, gate_up)
    else:
        group, pull = _bundle(static, dys[0].dtype, operands), lambda dx: [dx]
        if gate_up:
            x, pull = jax.vjp(xla.swiglu, *gate_up)
        dx, da, db = xla.backward(x, saved, group, static.rate, operands.key, dys)
        dxs = pull(dx)
    like = lambda gradients, leaves: [
        gradient.astype(leaf.dtype) for gradient, leaf in zip(gradients, leaves, strict=True)
    ]
    return list(dxs), Operands(None, None, like(da, operands.a), like(db, operands.b), None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def apply_group(statics: tuple[Static], x, operands: Operands, residual) -> list[jax.Array]:
    """Returns the outputs of a group's members on rows; that of one is added to `residual`."""
    return _forward(statics[0], x, operands, residual)[0]


def _group_forward(statics, x, operands: Operands, residual):
    outputs, saved = _forward(statics[0], x, operands, residual)
    return outputs, (x, operands, saved, _mark(residual))


def _group_backward(statics, residuals, dys):
    x, operands, saved, marked = residuals
    (dx,), of_operands = _backward(statics[0], x, operands, saved, dys)
    return dx, of_operands, _of_residual(marked, dys)


def _mark(residual):
    """Returns what says, without an array, whether there is a residual."""
    return None if residual is None else ()


def _of_residual(marked, dys):
    return None if marked is None else dys[0]


apply_group.defvjp(_group_forward, _group_backward)


def _swiglu(static: Static, x, operands: Operands, *, keep: bool):
    """Returns ``[silu(gate(x))·up(x)]``, with `keep` gate(x) and up(x) too, and what is saved."""
    if static.is_kernel:
        outputs, saved = _swiglu_kernel(static, "swiglu_keep" if keep else "swiglu", x, operands)
        return outputs, _named(saved)
    kept, saved = _forward(static, x, operands)
    return [xla.swiglu(*kept), *(kept if keep else ())], saved


@functools.partial(jax.jit, static_argnums=(0, 1))
def _swiglu_kernel(static: Static, epilogue, x, operands: Operands):
    from lorax_kernels.lora_linear import fused

    group = _bundle(static, x.dtype, operands)
    if not group.ranks:
        return fused.swiglu(x, None, None, group, epilogue), None
    packed = fused.pack(group, fused.lay_out(group), x.dtype)
    h = fused.down_project(x, packed[0], _kernel_dropout(static, x, operands))
    return fused.swiglu(x, h, packed[1], group, epilogue), fused.Saved(h, *packed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def apply_swiglu(recompute: bool, statics: tuple[Static], x, operands, _) -> list[jax.Array]:
    """Returns ``[silu(gate(x))·up(x)]``.

    The backward pass finds gate(x) and up(x) in memory or, to `recompute`, makes them again.
    """
    return _swiglu(statics[0], x, operands, keep=False)[0]


def _swiglu_forward(recompute: bool, statics, x, operands: Operands, _):
    (act, *kept), saved = _swiglu(statics[0], x, operands, keep=not recompute)
    return [act], (x, operands, saved, kept)


def _swiglu_backward(recompute: bool, statics, residuals, cotangents):
    (static,), (x, operands, saved, kept), (d_act,) = statics, residuals, cotangents
    if recompute and static.is_kernel:
        dys = _swiglu_gradients(static, x, operands, saved, d_act)
    else:
        if recompute:
            kept, _ = _forward(static, x, operands)
        dys = jax.vjp(xla.swiglu, *kept)[1](d_act)
    (dx,), of_operands = _backward(static, x, operands, saved, list(dys))
    return dx, of_operands, None


@functools.partial(jax.jit, static_argnums=0)
def _swiglu_gradients(static: Static, x, operands: Operands, saved, d_act):
    from lorax_kernels.lora_linear import fused

    group = _bundle(static, x.dtype, operands)
    h, packed_b = (saved.h, saved.b) if saved else (None, None)
    return fused.swiglu(x, h, packed_b, group, "swiglu_grad", [d_act])


apply_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def apply_mlp(
    repeated: bool, statics: tuple[Static, Static], x, gate_up: Operands, down: Operands, residual
) -> list[jax.Array]:
    """Returns ``[down(silu(gate(x))·up(x))]``, added to `residual`.

    The backward pass finds gate(x) and up(x) in memory, and makes the inner product of them.
    Where a `jax.checkpoint` around it has all of this `repeated`, no pass writes what it does not
    need: the first one makes the inner product alone, the second one gate(x) and up(x).
    """
    (act,), _ = _swiglu(statics[0], x, gate_up, keep=False)
    return _forward(statics[1], act, down, residual)[0]


def _mlp_forward(repeated: bool, statics, x, gate_up: Operands, down: Operands, residual):
    apart = repeated and statics[0].is_kernel
    (act, *kept), saved = _swiglu(statics[0], x, gate_up, keep=not apart)
    if apart:
        kept = _multiply(statics[0], x, gate_up, saved)
    outputs, saved_of_down = _forward(statics[1], act, down, residual)
    return outputs, (x, gate_up, saved, kept, down, saved_of_down, _mark(residual))


@functools.partial(jax.jit, static_argnums=0)
def _multiply(static: Static, x, operands: Operands, saved):
    from lorax_kernels.lora_linear import fused

    return fused.multiply(x, saved, _bundle(static, x.dtype, operands))


def _mlp_backward(repeated: bool, statics, residuals, dys):
    x, gate_up, saved, kept, down, saved_of_down, marked = residuals
    d_kept, of_down = _backward(statics[1], None, down, saved_of_down, dys, tuple(kept))
    (dx,), of_gate_up = _backward(statics[0], x, gate_up, saved, d_kept)
    return dx, of_gate_up, of_down, _of_residual(marked, dys)


apply_mlp.defvjp(_mlp_forward, _mlp_backward)
