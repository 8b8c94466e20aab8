"""One method's parameters on one layer of an NNX model."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from lorax.adapters import method, stack
from lorax.adapters.method import Cost, Params, Shape, Spec
from lorax.layers.carrier import Carrier, Frozen
from lorax.layers.maps import TokenRows, bias_of
from lorax_kernels import LoraWeights, Matrix, dense

NAME = "default"
"""PEFT's name of an adapter that was given none."""


class DropoutKey(nnx.Variable):
    """The key that decides one adapter's dropout mask; None until `set_dropout_key`."""


class Adapter(nnx.Module):
    """The values of an adapter: what trains is an `nnx.LoRAParam`, the rest `Frozen`.

    Args:
        spec: What it is.
        params: The first values of what trains, by name.
        fixed: The values that do not.
    """

    def __init__(self, spec: Spec, params: Params, fixed: Params | None = None):
        self.spec = spec
        self.dropout_key = DropoutKey(None)
        self.merged_factor = Frozen(None)
        self.fixed_names = tuple(fixed or ())
        for name, value in params.items():
            setattr(self, name, nnx.LoRAParam(value))
        for name, value in (fixed or {}).items():
            setattr(self, name, Frozen(value))

    @property
    def params(self) -> dict[str, Array]:
        """The values of what trains, by name."""
        return {name: getattr(self, name).get_value() for name in self.spec.method.parameters}

    @property
    def values(self) -> dict[str, Array]:
        """All values by name."""
        fixed = {name: getattr(self, name).get_value() for name in self.fixed_names}
        return {**self.params, **fixed}

    @property
    def dropout(self) -> float:
        """Probability with which an element of the input is dropped in training."""
        return self.spec.dropout

    @property
    def update(self) -> "Update":
        """The update that the adapter adds to its layer now."""
        return Update(self.spec, self.values, self.dropout_key.get_value())

    def set_trains(self, trains: bool) -> None:
        """Makes the parameters what trains, or what does not."""
        for name, value in self.params.items():
            setattr(self, name, nnx.LoRAParam(value) if trains else Frozen(value))

    def variable(self, name: str) -> Any:
        """Returns one parameter as the variable that trains."""
        return getattr(self, name)


@dataclasses.dataclass(frozen=True)
class Update:
    """The update that an adapter of these values adds to its layer.

    Attributes:
        spec: What it is.
        values: Its values by name.
        dropout_key: What decides the dropout mask; None until one was set.
    """

    spec: Spec
    values: Params
    dropout_key: Key[Array, ""] | None

    @property
    def dropout(self) -> float:
        """Probability with which an element of the input is dropped in training."""
        return self.spec.dropout

    def key(self) -> Key[Array, ""]:
        """Returns the key that decides the dropout mask.

        Raises:
            ValueError: If none was set.
        """
        if self.dropout_key is None:
            raise ValueError(
                "lora_dropout needs a fresh key every step: train with lorax.make_train_step, call "
                "lorax.set_dropout_key(model, key) in your own loop, or model.eval() to turn it off"
            )
        return self.dropout_key

    def operands(self, w: Matrix) -> LoraWeights | TokenRows:
        """See `Method.operands`."""
        return self.spec.method.operands(self.spec, w, self.values)


def attach(layer: Carrier, spec: Spec, key: Key[Array, ""], name: str = NAME) -> None:
    """Attaches a new adapter to a layer with a frozen kernel, and makes it the active one.

    Args:
        layer: The layer.
        spec: What it is.
        key: Decides its first values.
        name: Its name.
    """
    w = layer.matrix
    begun = stack.start(spec, w, key, layer.linear_map.kind)
    layer.attached[name] = Adapter(spec, begun.params, begun.fixed)
    activate(layer, name)


def activate(layer: Carrier, name: str | None) -> None:
    """Has one attached adapter compute and train, and no other; with None, none does."""
    layer.active = name
    for each, adapter in layer.attached.items():
        adapter.set_trains(each == name)


def shape_of(layer: Carrier) -> Shape:
    """Returns the shape (k, n) of a layer's matrix; the layer may be of shapes."""
    return Shape(*layer.linear_map.shape)


def rank_of(layer: Carrier) -> int:
    """Returns the rank of the update that a layer computes."""
    spec = layer.adapter.spec
    return spec.method.rank(spec, layer.linear_map.kind)


def cost_of(layer: Carrier) -> Cost:
    """Returns what the active adapter of a layer costs; the layer may be of shapes."""
    cost = method.cost_of(layer.adapter.spec, shape_of(layer), layer.linear_map.kind)
    return cost._replace(parameters=cost.parameters * math.prod(layer.matrix.shape[:-2]))


def merged_matrix(layer: Carrier) -> Float[Array, "k n"]:
    """Returns the matrix with the active adapter in it, rounded once to its dtype."""
    w = layer.matrix
    if layer.merged:
        return dense(w)
    adapter = layer.adapter
    return stack.merged(adapter.spec, layer.linear_map, w, adapter.values).astype(w.dtype)


def merged_bias(layer: Carrier) -> Array | None:
    """Returns the layer's bias with the adapter's in it, rounded once to its dtype.

    Raises:
        ValueError: If the adapter has one and the layer does not.
    """
    own = _own_bias(layer)
    if own is None or layer.merged:
        return None if layer.bias is None else layer.bias.get_value()
    if layer.bias is None:
        raise ValueError("its lora_bias cannot be merged, because the layer has no bias")
    return _sum(layer, own)


def unmerged_bias(layer: Carrier) -> Array | None:
    """Returns the bias of a merged layer without the adapter's, rounded to its dtype."""
    own = _own_bias(layer)
    if layer.bias is None or own is None:
        return None if layer.bias is None else layer.bias.get_value()
    return _sum(layer, -own)


def _sum(layer: Carrier, own: Array) -> Array:
    bias = layer.bias.get_value()
    total = bias.astype(own.dtype) + bias_of(layer.linear_map, own).reshape(bias.shape)
    return total.astype(bias.dtype)


def _own_bias(layer: Carrier) -> Array | None:
    operands = _operands(layer)
    return operands.bias if isinstance(operands, LoraWeights) else None


def _operands(layer: Carrier) -> LoraWeights | TokenRows:
    adapter = layer.adapter
    return stack.operands(adapter.spec, layer.matrix, adapter.values)


def merge_factor(layer: Carrier) -> Array | None:
    """Returns the factor that merging multiplies the columns by; None is 1."""
    operands = _operands(layer)
    return operands.factor if isinstance(operands, LoraWeights) else None


def begins_in_base(layer: Carrier) -> bool:
    """Says whether a layer subtracts what its active adapter began with."""
    return "first_a" in layer.adapter.fixed_names


def rebase(layer: Carrier) -> None:
    """Takes what the active adapter began with out of the layer's matrix instead."""
    w = layer.matrix
    adapter = layer.adapter
    fixed = {name: adapter.values[name] for name in adapter.fixed_names}
    product = jnp.matmul(fixed.pop("first_a"), fixed.pop("first_b"), precision="highest")
    rest = dense(w, jnp.float32) - jnp.float32(adapter.spec.scale) * product
    layer.freeze(rest.astype(w.dtype))
    if "squares" in fixed:
        fixed["squares"] = jnp.square(layer.matrix.astype(jnp.float32)).sum(-2)
    spec = dataclasses.replace(adapter.spec, start=True)
    layer.attached[layer.active] = Adapter(spec, adapter.params, fixed)


def split_start(layer: Carrier, r: int, start: str) -> None:
    """Undoes `Method.plain` of the active adapter, whose other half is what it began with.

    Args:
        layer: The layer.
        r: The rank that trained.
        start: The initialisation that it began with.
    """
    adapter = layer.adapter
    a = adapter.params["lora_a"]
    b = adapter.params["lora_b"]
    params = {**adapter.params, "lora_a": a[..., :r], "lora_b": b[..., :r, :]}
    fixed = {"first_a": a[..., r:], "first_b": -b[..., r:, :]}
    fixed |= {name: adapter.values[name] for name in adapter.fixed_names}
    alpha = adapter.spec.scale * (r**0.5 if adapter.spec.use_rslora else r)
    spec = dataclasses.replace(adapter.spec, r=r, lora_alpha=alpha, start=start)
    layer.attached[layer.active] = Adapter(spec, params, fixed)


def unmerged_matrix(layer: Carrier) -> Float[Array, "k n"]:
    """Returns the matrix of a merged layer without its adapter, rounded to its dtype."""
    w = layer.matrix
    spec = layer.adapter.spec
    linear_map = layer.linear_map
    unmerge = stack.over_stack(lambda w, v, f: method.unmerged(spec, linear_map, w, v, f), w)
    factor = layer.adapter.merged_factor.get_value()
    return unmerge(w, layer.adapter.values, factor).astype(w.dtype)
