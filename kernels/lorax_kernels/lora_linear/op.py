"""`lora_linear`, its groups, SwiGLU and the MLP: argument checks, the choice of implementation."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from lorax_kernels.dispatch import Kernels
from lorax_kernels.dtypes import accumulation_dtype
from lorax_kernels.lora_linear import choice, xla
from lorax_kernels.lora_linear.calls import apply_group, apply_mlp, apply_swiglu, run
from lorax_kernels.lora_linear.weights import LoraWeights
from lorax_kernels.weights import Matrix


def lora_linear(
    x: Float[Array, "*batch k"],
    w: Matrix,
    a: Float[Array, "k r"],
    b: Float[Array, "r n"],
    *,
    scale: float,
    bias: Float[Array, " n"] | None = None,
    factor: Float[Array, " n"] | None = None,
    residual: Float[Array, "*batch n"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
    kernels: Kernels = "auto",
    row_axes: Sequence[str] = (),
) -> Float[Array, "*batch n"]:
    """Applies a frozen linear map and its low-rank update.

    ``factor·(x·w + scale·(dropout(x)·a)·b) + bias + residual``. The residual costs the kernel no
    pass of its own, except where the rank is 33 to 64 and k more than 3·n. Nor does the factor in
    the forward pass; for its gradient what it multiplies is stored beside the output.

    Operands take `x`'s dtype and every matmul accumulates in float32. `da` and `db` have the dtypes
    of `a` and `b`. `w` and `bias` are frozen: their gradients are never computed, and
    differentiating with respect to them gives zeros.

    Args:
        x: Input rows.
        w: Frozen weight: an array, or a `Weight`. Where the kernel cannot read its stored form,
            both passes compute the dense matrix, multiply, and keep no copy.
        a: Down-projection to the rank r.
        b: Up-projection from the rank r.
        scale: ``alpha / r``, or ``alpha / √r`` under rank stabilisation; a Python number.
        bias: Frozen bias.
        factor: Factor of every column, which has a gradient, also where it is 0; None is 1.
        residual: Added to the output, in `x`'s dtype; it has a gradient.
        dropout_rate: Probability with which an element of `x` is zeroed on the update's path.
        dropout_key: Decides the dropout mask; required when `dropout_rate` is not 0.
        kernels: ``pallas`` runs the fused kernel (Hopper; k and n multiples of 64 and at least 128,
            bfloat16 or float16, rank at most 256, a weight that it can read), ``xla`` plain XLA,
            ``auto`` the faster one by measurements at such a shape.
        row_axes: Mesh axes that divide the first dimension of `x`. The compiler cannot divide the
            kernel, so under a mesh it runs once per shard of these axes.

    Returns:
        The adapted output, in `x`'s dtype.

    Raises:
        ValueError: If shapes disagree, `x` is not floating point, `dropout_rate` is outside
            [0, 1), a dropout has no key, or ``pallas`` is asked for where it cannot run.

    Source: Hu et al. 2021, "LoRA", eq. 3, https://arxiv.org/abs/2106.09685
    """
    members = [LoraWeights(w, a, b, bias, scale, factor)]
    options = {"kernels": kernels, "row_axes": row_axes, "residual": residual}
    return _apply(x, members, dropout_rate, dropout_key, **options)[0]


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
    update, differ in rank, and have biases and factors. They share one dropout of `x`. Where one
    has a factor, the kernel writes for each what factors multiply, and that of the others is not
    kept.

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
    return _apply(x, members, dropout_rate, dropout_key, kernels=kernels, row_axes=row_axes)


def _apply(
    x,
    members: Sequence[LoraWeights],
    dropout_rate: float,
    dropout_key,
    *,
    kernels: Kernels,
    row_axes: Sequence[str],
    residual=None,
) -> list[jax.Array]:
    """Returns the outputs of a group; `residual` is added to a single output."""
    _validate(x, members, dropout_rate, dropout_key)
    _validate_residual(residual, x, members[0].w)
    rate = _rate(members, dropout_rate)
    implementation = choice.choose(x, members, rate, kernels, row_axes)
    parts = choice.split(members, rate) if implementation == "pallas" else [range(len(members))]
    outputs = []
    for part in parts:
        group = [members[i] for i in part]
        keys = [dropout_key]
        outputs += run(x, [group], rate, keys, row_axes, apply_group, implementation, residual)
    return outputs


def scale_columns(y: Float[Array, "*batch n"], factor: Float[Array, " n"]):
    """Returns ``factor · y`` in `y`'s dtype: multiplied in float32 and rounded once."""
    wide = accumulation_dtype(y.dtype)
    along = factor.astype(wide).reshape((1,) * (y.ndim - 1) + (-1,))
    return (y.astype(wide) * along).astype(y.dtype)


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

    The kernel computes the result from the sums while they are in registers; without a gradient,
    gate and up never reach memory. With one, they are stored before their factors.

    Args:
        x: Input rows.
        gate: The layer whose output passes through ``silu``.
        up: The layer that it multiplies.
        dropout_rate: As in `lora_linear`.
        dropout_key: As in `lora_linear`.
        kernels: As in `lora_linear`.
        row_axes: As in `lora_linear`.
        recompute: Whether the backward pass recomputes gate(x) and up(x) instead of storing them:
            two thirds of the activations of a SwiGLU layer.

    Returns:
        The inner product, in `x`'s dtype.

    Raises:
        ValueError: As `lora_linear`, and if the layers' widths differ or they have biases.

    Source: Shazeer 2020, eq. 6, https://arxiv.org/abs/2002.05202
    """
    members = [gate, up]
    _validate(x, members, dropout_rate, dropout_key)
    _validate_pair(gate, up)
    rate = _rate(members, dropout_rate)
    implementation = choice.choose(x, members, rate, kernels, row_axes)
    if implementation == "pallas" and len(choice.split(members, rate)) > 1:
        return _swiglu_apart(x, members, rate, dropout_key, "pallas", row_axes, recompute)
    function = functools.partial(apply_swiglu, recompute)
    return run(x, [members], rate, [dropout_key], row_axes, function, implementation)[0]


def _swiglu_apart(x, members, rate: float, key, kernels: Kernels, row_axes, recompute: bool):
    """Returns ``silu(gate(x)) · up(x)`` of a group's outputs."""

    def apart(x, members):
        options: dict[str, Any] = {"dropout_rate": rate, "dropout_key": key}
        options |= {"kernels": kernels, "row_axes": row_axes}
        gate, up = lora_linear_group(x, members, **options)
        return xla.swiglu(gate, up)

    return (jax.checkpoint(apart) if recompute else apart)(x, members)


def lora_mlp(
    x: Float[Array, "*batch k"],
    gate: LoraWeights,
    up: LoraWeights,
    down: LoraWeights,
    *,
    residual: Float[Array, "*batch d"] | None = None,
    dropout_rate: float = 0.0,
    dropout_keys: tuple[Key[Array, ""] | None, Key[Array, ""] | None] = (None, None),
    kernels: Kernels = "auto",
    row_axes: Sequence[str] = (),
    repeated: bool = False,
) -> Float[Array, "*batch d"]:
    """Applies a whole SwiGLU layer: ``down(silu(gate(x)) · up(x))``.

    It is `lora_linear` of `lora_swiglu`. Only `x`, gate(x) and up(x) are stored. In the backward
    pass the kernel computes the gradients of gate(x) and up(x) from that of the inner product while
    it is in registers, and recomputes the inner product from the two.

    Args:
        x: Input rows.
        gate: The layer whose output passes through ``silu``.
        up: The layer that it multiplies.
        down: The layer that reads the inner product.
        residual: As in `lora_linear`.
        dropout_rate: As in `lora_linear`.
        dropout_keys: Dropout keys of the inputs of gate and up, and of down.
        kernels: As in `lora_linear`.
        row_axes: As in `lora_linear`.
        repeated: Whether it is in a `jax.checkpoint` that stores only x·A of it; then neither pass
            writes what only the other one needs. Elsewhere it costs a matmul.

    Returns:
        The output, in `x`'s dtype.

    Raises:
        ValueError: As `lora_linear`, and if the layers do not fit each other, or gate or up has a
            bias.
    """
    first = [gate, up]
    second = [down]
    _validate_pair(gate, up)
    _validate(x, first, _rate(first, dropout_rate), dropout_keys[0])
    inner = jax.ShapeDtypeStruct((*x.shape[:-1], gate.w.shape[1]), x.dtype)
    _validate(inner, second, _rate(second, dropout_rate), dropout_keys[1])
    _validate_residual(residual, x, down.w)
    rate = _rate([*first, *second], dropout_rate)
    choose = functools.partial(choice.choose, rate=rate, kernels=kernels, row_axes=row_axes)
    implementations = {choose(x, first), choose(inner, second)}
    in_parts = "pallas" in implementations and len(choice.split(first, rate)) > 1
    if len(implementations) > 1 or in_parts:
        options: dict[str, Any] = {"kernels": kernels, "row_axes": row_axes}
        options |= {"dropout_rate": _rate(first, dropout_rate)}
        product = lora_swiglu(x, gate, up, dropout_key=dropout_keys[0], **options)
        rate = _rate(second, dropout_rate)
        key = dropout_keys[1]
        options = {"kernels": kernels, "row_axes": row_axes, "residual": residual}
        return _apply(product, second, rate, key, **options)[0]
    (implementation,) = implementations
    function = functools.partial(apply_mlp, repeated)
    groups = [first, second]
    return run(x, groups, rate, dropout_keys, row_axes, function, implementation, residual)[0]


def _rate(members: Sequence[LoraWeights], dropout_rate: float) -> float:
    return float(dropout_rate) if any(member.a is not None for member in members) else 0.0


def _validate_pair(gate: LoraWeights, up: LoraWeights) -> None:
    if gate.w.shape != up.w.shape:
        raise ValueError(f"gate and up must have one shape, got {gate.w.shape} and {up.w.shape}")
    if gate.bias is not None or up.bias is not None:
        raise ValueError("gate and up must have no biases: use lora_linear_group")


def _validate_residual(residual, x, w) -> None:
    if residual is None:
        return
    wanted = (*x.shape[:-1], w.shape[1])
    if (residual.shape, residual.dtype) != (wanted, x.dtype):
        got = f"{residual.dtype} {residual.shape}"
        raise ValueError(f"the residual must be {x.dtype} {wanted}, got {got}")


def _validate(x, members: Sequence[LoraWeights], dropout_rate, dropout_key):
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating point, got {x.dtype}")
    for member in members:
        w = member.w
        a = member.a
        b = member.b
        bias = member.bias
        if (a is None) != (b is None):
            raise ValueError("a and b come together, or not at all")
        shapes = f"x {x.shape}, w {w.shape}"
        fit = x.ndim >= 1 and len(w.shape) == 2 and x.shape[-1] == w.shape[0]
        if a is not None and b is not None:
            shapes += f", a {a.shape}, b {b.shape}"
            fit = fit and a.ndim == 2 and b.ndim == 2
            fit = fit and a.shape[0] == w.shape[0] and b.shape == (a.shape[1], w.shape[1])
        if not fit:
            raise ValueError(f"need x (…, k), w (k, n), a (k, r), b (r, n); got {shapes}")
        for name, vector in (("bias", bias), ("factor", member.factor)):
            if vector is not None and vector.shape != (w.shape[1],):
                raise ValueError(f"need {name} ({w.shape[1]},), got {vector.shape}")
    if not 0.0 <= dropout_rate < 1.0:
        raise ValueError(f"dropout_rate must be in [0, 1), got {dropout_rate}")
    if dropout_rate > 0.0 and dropout_key is None and any(m.a is not None for m in members):
        raise ValueError(f"dropout_rate is {dropout_rate} but no dropout_key was given")
