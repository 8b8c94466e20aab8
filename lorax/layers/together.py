"""Layers that run in one operation: q, k and v; gate and up; the whole MLP; a residual added."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from lorax.devices.mesh import ROW_AXES
from lorax.layers.carrier import Frozen, apply_adapted, compute_dtype
from lorax.layers.linear import Linear, finish, is_plain, promises
from lorax.layers.maps import with_bias
from lorax_kernels import (
    Kernels,
    LoraWeights,
    lora_linear_group,
    lora_mlp,
    lora_swiglu,
    swiglu,
)


def apply_together(layers: Sequence[Any], x: Float[Array, "*batch k"]) -> list[Array]:
    """Returns the outputs of layers that read one input.

    Where they can run as one operation they share one read of x, one launch where the kernel runs,
    and one dropout of x.

    Args:
        layers: Modules that are called like a linear layer.
        x: Their input.
    """
    group = _group(layers, x.dtype)
    if group is None or group.way is None:
        return [layer(x) for layer in layers]
    outputs = lora_linear_group(
        x.astype(group.dtype), group.members, dropout_key=group.key, **_options(group.way)
    )
    return [
        finish(layer, with_bias(y, own), has_bias=member.bias is not None)
        for layer, member, own, y in zip(layers, group.members, group.own, outputs, strict=True)
    ]


def apply_added(
    layer: Any, x: Float[Array, "*batch k"], residual: Float[Array, "*batch n"]
) -> Float[Array, "*batch n"]:
    """Returns ``residual + layer(x)``, in one operation where they have one dtype."""
    adapted = is_plain(layer) and layer.computing is not None
    if adapted and promises(layer, residual.dtype, x.dtype):
        return finish(layer, apply_adapted(layer, x, residual))
    return residual + layer(x)


def apply_mlp(
    gate: Any,
    up: Any,
    down: Any,
    x: Float[Array, "*batch d"],
    residual: Float[Array, "*batch d"],
    repeated: bool,
) -> Float[Array, "*batch d"]:
    """Returns ``residual + down(silu(gate(x)) · up(x))``, in as few operations as possible.

    Args:
        gate: The layer whose output passes through ``silu``.
        up: The layer that it multiplies.
        down: The layer that reads the inner product.
        x: Input of gate and up.
        residual: Added to the output.
        repeated: Whether the backward pass recomputes all of it; see `lorax_kernels.lora_mlp`.
    """
    pair = _group((gate, up), x.dtype)
    if pair is None or not all(map(_is_bare, (gate, up), pair.own)):
        return residual + down(_multiply(*apply_together((gate, up), x)))
    single = _group((down,), pair.dtype)
    way = None if single is None else _common_way(pair, single)
    if single is not None and single.own != [None]:
        way = None
    if single is not None and way is not None and promises(down, residual.dtype, pair.dtype):
        y = lora_mlp(
            x.astype(pair.dtype),
            *pair.members,
            *single.members,
            residual=residual,
            dropout_keys=(pair.key, single.key),
            repeated=repeated,
            **_options(way),
        )
        return finish(down, y, has_bias=single.members[0].bias is not None)
    if pair.way is None:
        return residual + down(_multiply(gate(x), up(x)))
    options = _options(pair.way)
    return residual + down(
        lora_swiglu(x.astype(pair.dtype), *pair.members, dropout_key=pair.key, **options)
    )


_multiply = jax.checkpoint(swiglu)
"""``silu(gate) · up`` as the kernels round it; its backward pass keeps nothing but the two."""


class _Way(NamedTuple):
    """Settings of an adapted layer that layers must share to run in one operation."""

    dropout_rate: float
    kernels: Kernels


class _Group(NamedTuple):
    """Operands of one call for several layers.

    Attributes:
        members: One per layer, with its bias if that is frozen.
        own: The biases of their adapters, each or None.
        dtype: Dtype of the matmuls.
        way: The settings of the adapted members; None if there are none.
        key: Dropout key of the first member; None without dropout.
    """

    members: list[LoraWeights]
    own: list[Array | None]
    dtype: jnp.dtype
    way: _Way | None
    key: Key[Array, ""] | None


def _group(layers: Sequence[Any], dtype: Any) -> _Group | None:
    """Returns the operands of one call for all layers, or None if they cannot share it.

    Layers without an adapter may be members while they are frozen: the operations give no gradient
    of a base weight.
    """
    members = []
    own = []
    dtypes = set()
    ways = set()
    key = None
    for layer in layers:
        if not is_plain(layer) or not isinstance(layer.kernel, Frozen):
            return None
        adapter = layer.computing
        member = LoraWeights(layer.kernel.get_value())
        if adapter is not None:
            operands = adapter.operands(member.w)
            if not isinstance(operands, LoraWeights):
                return None
            member = operands
            ways.add(_Way(layer.dropout_rate, layer.kernels_now))
            key = adapter.key() if layer.dropout_rate and key is None else key
        own.append(member.bias)
        members.append(dataclasses.replace(member, bias=_frozen_bias(layer)))
        dtypes.add(compute_dtype(layer, dtype))
    if len(dtypes) > 1 or len(ways) > 1:
        return None
    return _Group(members, own, dtypes.pop(), ways.pop() if ways else None, key)


def _common_way(group: _Group, other: _Group) -> _Way | None:
    """Returns the settings that both share, or None: they differ, or no layer is adapted."""
    ways = {group.way, other.way} - {None}
    return ways.pop() if len(ways) == 1 and group.dtype == other.dtype else None


def _options(way: _Way) -> dict[str, Any]:
    return {**way._asdict(), "row_axes": ROW_AXES}


def _frozen_bias(layer: Linear) -> Array | None:
    """Returns the bias of a layer, if it does not train: the kernels give it no gradient."""
    return layer.bias.get_value() if isinstance(layer.bias, Frozen) else None


def _is_bare(layer: Linear, own: Array | None) -> bool:
    """Says whether a layer's output is its matmul, with nothing added and not cast."""
    return layer.bias is None and own is None and layer.preferred_element_type is None
