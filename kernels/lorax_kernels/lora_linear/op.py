"""`lora_linear`, its groups and its SwiGLU pair: argument checks, the choice of implementation."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from lorax_kernels.lora_linear import choice, xla
from lorax_kernels.lora_linear.calls import apply_group, apply_swiglu, run
from lorax_kernels.lora_linear.choice import Kernels
from lorax_kernels.lora_linear.weights import LoraWeights


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
    again: Float[Array, "*batch k"] | None = None,
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
        again: `x` by another route, for the backward pass to read instead. Under `jax.checkpoint`,
            where that route is cheap to run again, neither is kept. It gets no gradient.

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
        again=again,
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
    again: Float[Array, "*batch k"] | None = None,
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
        again: As in `lora_linear`.

    Returns:
        One output per member, in `x`'s dtype.

    Raises:
        ValueError: As `lora_linear`.
    """
    _validate(x, members, dropout_rate, dropout_key)
    rate = float(dropout_rate) if any(m.a is not None for m in members) else 0.0
    if again is not None and (again.shape, again.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"again must be like x, {x.dtype}{x.shape}; got {again.dtype}{again.shape}"
        )
    call = functools.partial(run, (x, again), members, rate, dropout_key, row_axes)
    implementation = choice.choose(x, members, rate, kernels, row_axes)
    if implementation == "pallas":
        outputs = []
        for part in choice.split(members, rate):
            outputs += call(part, apply_group, "pallas")
        return outputs
    return call(range(len(members)), apply_group, "xla")


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
    mode = "recompute" if recompute else "keep"
    options = {"dropout_rate": dropout_rate, "dropout_key": dropout_key}
    return _run_swiglu(mode, x, [gate, up], kernels=kernels, row_axes=row_axes, **options)[0]


def lora_swiglu_again(
    x: Float[Array, "*batch k"], gate: LoraWeights, up: LoraWeights, **options: Any
) -> tuple[Float[Array, "*batch n"], Float[Array, "*batch n"]]:
    """Returns `lora_swiglu`, and the same product made from gate(x) and up(x): see `again`.

    The second is for the layer that reads the first. It has no gradient, and is made from rounded
    operands, so the two are equal to rounding.

    Args:
        x: Input rows.
        gate: The layer whose output passes through ``silu``.
        up: The layer that it multiplies.
        **options: Those of `lora_swiglu` but `recompute`.
    """
    act, *parts = _run_swiglu("show", x, [gate, up], **options)
    return act, xla.swiglu(*map(jax.lax.stop_gradient, parts))


def _run_swiglu(
    mode: str,
    x,
    members: Sequence[LoraWeights],
    *,
    dropout_rate: float = 0.0,
    dropout_key=None,
    kernels: Kernels = "auto",
    row_axes: Sequence[str] = (),
) -> list[jax.Array]:
    """Returns the product and, in the mode ``show``, gate(x) and up(x)."""
    gate, up = members
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

        def apart(x):
            parts = lora_linear_group(x, members, **options)
            return [xla.swiglu(*parts), *parts]

        return (jax.checkpoint(apart) if mode == "recompute" else apart)(x)
    function = functools.partial(apply_swiglu, mode)
    call = functools.partial(run, (x, None), members, rate, dropout_key, row_axes)
    return call(range(2), function, implementation)


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
