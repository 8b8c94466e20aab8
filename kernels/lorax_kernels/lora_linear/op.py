"""`lora_linear` and its groups: argument checks, the choice of implementation, the gradient.

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
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Key

from lorax_kernels.lora_linear import choice, xla
from lorax_kernels.lora_linear.choice import Kernels
from lorax_kernels.lora_linear.dropout import seed_words
from lorax_kernels.lora_linear.weights import Group, LoraWeights

KERNEL_ROWS = 16  # fewer rows, or a number that is no multiple of 8, are padded to this multiple


def lora_linear(
    x: Float[Array, "*batch k"],
    w: Float[Array, "k n"],
    a: Float[Array, "k r"],
    b: Float[Array, "r n"],
    *,
    scale: float,
    bias: Float[Array, " n"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
    kernels: Kernels = "auto",
    row_axes: Sequence[str] = (),
) -> Float[Array, "*batch n"]:
    """Applies a frozen linear map and its low-rank update: ``x·w + scale·(dropout(x)·a)·b + bias``.

    Operands take `x`'s dtype and every product accumulates in float32. `da` and `db` come in the
    dtypes of `a` and `b`. `w` and `bias` are frozen: their gradients are never computed, and
    differentiating with respect to them gives zeros.

    Args:
        x: Input rows.
        w: Frozen weight.
        a: Down-projection to the rank r.
        b: Up-projection from the rank r.
        scale: ``alpha / r``, or ``alpha / √r`` under rank stabilisation.
        bias: Frozen bias.
        dropout_rate: Probability with which an element of `x` is zeroed on the update's path.
        dropout_key: Decides the dropout mask; required when `dropout_rate` is not 0.
        kernels: ``pallas`` runs the fused kernel (Hopper; k and n multiples of 64 and at least 128,
            bfloat16 or float16, rank at most 256), ``xla`` plain XLA, ``auto`` whichever was
            faster when measured at such a shape.
        row_axes: Mesh axes that divide the first dimension of `x`. The kernel cannot be divided by
            the compiler, so under a mesh it runs once per shard of these axes.

    Returns:
        The adapted output, in `x`'s dtype.

    Raises:
        ValueError: If shapes disagree, `x` is not floating point, `dropout_rate` is outside
            [0, 1), a dropout has no key, or ``pallas`` is asked for where it cannot run.

    Source: Hu et al. 2021, "LoRA", eq. 3, https://arxiv.org/abs/2106.09685
    """
    member = LoraWeights(w, a, b, bias, scale)
    (y,) = lora_linear_group(
        x,
        [member],
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        kernels=kernels,
        row_axes=row_axes,
    )
    return y


def lora_linear_group(
    x: Float[Array, "*batch k"],
    members: Sequence[LoraWeights],
    *,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
    kernels: Kernels = "auto",
    row_axes: Sequence[str] = (),
) -> list[Float[Array, "*batch n"]]:
    """Applies several linear layers to one input, as `lora_linear` each: q, k and v; gate and up.

    `x` is read once for all members, and the gradient of `x` is one sum. Members may lack an
    update, differ in rank, and have biases. They share one dropout of `x`.

    Args:
        x: Input rows.
        members: The layers.
        dropout_rate: As in `lora_linear`.
        dropout_key: As in `lora_linear`.
        kernels: As in `lora_linear`.
        row_axes: As in `lora_linear`.

    Returns:
        One output per member, in `x`'s dtype.

    Raises:
        ValueError: As `lora_linear`.
    """
    _validate(x, members, dropout_rate, dropout_key)
    rate = float(dropout_rate) if any(m.a is not None for m in members) else 0.0
    run = functools.partial(_run_group, x, members, rate, dropout_key, row_axes)
    implementation = choice.choose(x, members, rate, kernels, row_axes)
    if implementation == "pallas":
        outputs = []
        for part in choice.split(members, rate):
            outputs += run(part, _group, "pallas")
        return outputs
    return run(range(len(members)), _group, "xla")


def lora_swiglu(
    x: Float[Array, "*batch k"],
    gate: LoraWeights,
    up: LoraWeights,
    *,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
    kernels: Kernels = "auto",
    row_axes: Sequence[str] = (),
    recompute: bool = False,
) -> Float[Array, "*batch n"]:
    """Applies two linear layers to one input and combines them: ``silu(gate(x)) · up(x)``.

    The kernel forms the result from the sums while they are in registers; where no gradient is
    asked for, gate and up never reach memory.

    Args:
        x: Input rows.
        gate: The layer whose output passes through ``silu``.
        up: The layer that it multiplies.
        dropout_rate: As in `lora_linear`.
        dropout_key: As in `lora_linear`.
        kernels: As in `lora_linear`.
        row_axes: As in `lora_linear`.
        recompute: Whether the backward pass multiplies again instead of keeping gate(x) and up(x),
            which are two thirds of what a SwiGLU layer keeps.

    Returns:
        The product, in `x`'s dtype.

    Raises:
        ValueError: As `lora_linear`, and if the layers' widths differ or they have biases.

    Source: Shazeer 2020, eq. 6, https://arxiv.org/abs/2002.05202
    """
    members = [gate, up]
    _validate(x, members, dropout_rate, dropout_key)
    if gate.w.shape != up.w.shape:
        raise ValueError(f"gate and up must have one shape, got {gate.w.shape} and {up.w.shape}")
    if gate.bias is not None or up.bias is not None:
        raise ValueError("lora_swiglu takes layers without biases: use lora_linear_group")
    rate = float(dropout_rate) if any(m.a is not None for m in members) else 0.0
    implementation = choice.choose(x, members, rate, kernels, row_axes)
    if implementation == "pallas" and len(choice.split(members, rate)) > 1:
        options: dict[str, Any] = {"dropout_rate": rate, "dropout_key": dropout_key}
        options |= {"kernels": "pallas", "row_axes": row_axes}
        return xla.swiglu(*lora_linear_group(x, members, **options))
    function = functools.partial(_swiglu, recompute)
    run = functools.partial(_run_group, x, members, rate, dropout_key, row_axes)
    (act,) = run(range(2), function, implementation)
    return act


def _validate(x, members: Sequence[LoraWeights], dropout_rate, dropout_key):
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating point, got {x.dtype}")
    for member in members:
        w, a, b, bias = member.w, member.a, member.b, member.bias
        if (a is None) != (b is None):
            raise ValueError("a and b come together, or not at all")
        shapes = f"x {x.shape}, w {w.shape}"
        fit = x.ndim >= 1 and w.ndim == 2 and x.shape[-1] == w.shape[0]
        if a is not None and b is not None:
            shapes += f", a {a.shape}, b {b.shape}"
            fit = fit and a.ndim == 2 and b.ndim == 2
            fit = fit and a.shape[0] == w.shape[0] and b.shape == (a.shape[1], w.shape[1])
        if not fit:
            raise ValueError(f"need x (…, k), w (k, n), a (k, r), b (r, n); got {shapes}")
        if bias is not None and bias.shape != (w.shape[1],):
            raise ValueError(f"need bias ({w.shape[1]},), got {bias.shape}")
    if not 0.0 <= dropout_rate < 1.0:
        raise ValueError(f"dropout_rate must be in [0, 1), got {dropout_rate}")
    if dropout_rate > 0.0 and dropout_key is None:
        raise ValueError(f"dropout_rate is {dropout_rate} but no dropout_key was given")


@dataclasses.dataclass(frozen=True)
class _Static:
    """What `_group` and `_swiglu` know at trace time."""

    members: tuple[int, ...]
    scales: tuple[float, ...]
    rate: float
    implementation: str
    axes: tuple[str, ...]  # of the mesh, where the kernel runs inside shard_map


def _run_group(
    x,
    members: Sequence[LoraWeights],
    rate: float,
    key,
    row_axes,
    which: Sequence[int],
    function: Callable[..., Any],
    implementation: str,
) -> list[jax.Array]:
    """Calls `function` on the chosen members, under a mesh once per shard of the rows."""
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

    def local(x, *operands):
        m = math.prod(x.shape[:-1])
        rows = x.reshape(m, x.shape[-1])
        if implementation == "pallas" and (m % 8 or m < KERNEL_ROWS):
            rows = jnp.pad(rows, ((0, -m % KERNEL_ROWS), (0, 0)))
        outputs = function(static, rows, *operands)
        return [y[:m].reshape(*x.shape[:-1], y.shape[1]) for y in outputs]

    if not axes:
        return local(x, *operands)
    rows = PartitionSpec(axes)
    # Without shard_map the compiler would gather every operand and run the kernel whole on each
    # device. The gradients of a and b are summed over the shards, as they enter unsharded.
    specs = jax.tree.map(lambda _: PartitionSpec(), operands)
    sharded = jax.shard_map(local, in_specs=(rows, *specs), out_specs=rows, check_vma=False)
    return sharded(x, *operands)


def _bundle(static: _Static, w, biases, a, b) -> Group:
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
def _group(static: _Static, x, w, biases, a, b, key) -> list[jax.Array]:
    return _forward(static, x, w, biases, a, b, key)[0]


def _forward(static: _Static, x, w, biases, a, b, key):
    if static.implementation == "pallas":
        outputs, saved = _kernel_forward(static, x, w, biases, a, b, key)
    else:
        group = _bundle(static, w, biases, a, b)
        outputs, saved = xla.forward(x, group, static.rate, key)
    return outputs, (x, w, biases, a, b, key, saved)


# Compiled functions of their own, so that equal layers are lowered and compiled once.
@functools.partial(jax.jit, static_argnums=0)
def _kernel_forward(static: _Static, x, w, biases, a, b, key):
    from lorax_kernels.lora_linear import fused

    group = _bundle(static, w, biases, a, b)
    return fused.forward(x, group, _kernel_dropout(static, x, key))


@functools.partial(jax.jit, static_argnums=0)
def _kernel_backward(static: _Static, x, w, biases, a, b, key, saved, dys):
    from lorax_kernels.lora_linear import fused

    group = _bundle(static, w, biases, a, b)
    return fused.backward(x, saved, group, _kernel_dropout(static, x, key), dys)


def _backward(static: _Static, residuals, dys):
    x, w, biases, a, b, key, saved = residuals
    if static.implementation == "pallas":
        dx, da, db = _kernel_backward(static, x, w, biases, a, b, key, saved, dys)
    else:
        group = _bundle(static, w, biases, a, b)
        dx, da, db = xla.backward(x, saved, group, static.rate, key, dys)
    da = [gradient.astype(leaf.dtype) for gradient, leaf in zip(da, a, strict=True)]
    db = [gradient.astype(leaf.dtype) for gradient, leaf in zip(db, b, strict=True)]
    return dx, None, None, da, db, None


_group.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _swiglu(recompute: bool, static: _Static, x, w, biases, a, b, key) -> list[jax.Array]:
    group = _bundle(static, w, biases, a, b)
    if static.implementation == "xla":
        outputs, _ = xla.forward(x, group, static.rate, key)
        return [xla.swiglu(*outputs)]
    return _swiglu_kernel(static, "swiglu", x, w, biases, a, b, key)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _swiglu_kernel(static: _Static, epilogue, x, w, biases, a, b, key):
    from lorax_kernels.lora_linear import fused

    group = _bundle(static, w, biases, a, b)
    if not group.ranks:
        return fused.swiglu(x, None, None, group, epilogue), None
    packed = fused.pack(group, fused.lay_out(group), x.dtype)
    h = fused.down_project(x, packed[0], _kernel_dropout(static, x, key))
    return fused.swiglu(x, h, packed[1], group, epilogue), fused.Saved(h, *packed)


def _swiglu_forward(recompute: bool, static: _Static, x, w, biases, a, b, key):
    group = _bundle(static, w, biases, a, b)
    if static.implementation == "xla":
        kept, saved = xla.forward(x, group, static.rate, key)
        act = xla.swiglu(*kept)
    else:
        epilogue = "swiglu" if recompute else "swiglu_keep"
        (act, *kept), saved = _swiglu_kernel(static, epilogue, x, w, biases, a, b, key)
    return [act], (x, w, biases, a, b, key, saved, None if recompute else kept)


def _swiglu_backward(recompute: bool, static: _Static, residuals, cotangents):
    x, w, biases, a, b, key, saved, kept = residuals
    (d_act,) = cotangents
    group = _bundle(static, w, biases, a, b)
    if recompute and static.implementation == "pallas":
        dys = _swiglu_gradients(static, x, w, biases, a, b, saved, d_act)
    else:
        if kept is None:
            kept, _ = xla.forward(x, group, static.rate, key)
        dys = jax.vjp(xla.swiglu, *kept)[1](d_act)
    return _backward(static, (x, w, biases, a, b, key, saved), list(dys))


@functools.partial(jax.jit, static_argnums=0)
def _swiglu_gradients(static: _Static, x, w, biases, a, b, saved, d_act):
    from lorax_kernels.lora_linear import fused

    group = _bundle(static, w, biases, a, b)
    h, packed_b = (saved.h, saved.b) if saved else (None, None)
    return fused.swiglu(x, h, packed_b, group, "swiglu_grad", d_act)


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)
