"""One method's parameters on one layer of an NNX model."""

import dataclasses
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Key

from lorax.adapters.method import Cost, Params, Shape, Spec
from lorax.layers.linear import Frozen, Linear
from lorax_kernels import LoraWeights, Matrix, dense

NAME = "default"
"""PEFT's name of an adapter that was given none."""


class DropoutKey(nnx.Variable):
    """The key that decides one adapter's dropout mask; None until `set_dropout_key`."""


class Adapter(nnx.Module):
    """The parameters of an adapter, `nnx.LoRAParam` each, and how its method computes with them.

    Args:
        spec: What it is.
        params: Its first values, by the names that the method gives.
    """

    def __init__(self, spec: Spec, params: Params):
        self.spec = spec
        self.dropout_key = DropoutKey(None)
        for name, value in params.items():
            setattr(self, name, nnx.LoRAParam(value))

    @property
    def params(self) -> dict[str, Array]:
        """The values by name."""
        return {name: getattr(self, name).get_value() for name in self.spec.method.keys}

    @property
    def dropout(self) -> float:
        """Probability with which an element of the input is dropped in training."""
        return self.spec.dropout

    @property
    def update(self) -> "Update":
        """The update that the adapter adds to its layer now."""
        return Update(self.spec, self.params, self.dropout_key.get_value())

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
        params: Its values, by the names that the method gives.
        dropout_key: What decides the dropout mask; None until one was set.
    """

    spec: Spec
    params: Params
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

    def operands(self, w: Matrix) -> LoraWeights | None:
        """See `Method.operands`."""
        return self.spec.method.operands(self.spec, w, self.params)

    def apply(self, x: Float[Array, "*batch k"], w: Matrix, rate: float):
        """See `Method.apply`."""
        key = self.key() if rate else None
        return self.spec.method.apply(self.spec, w, self.params, x, rate, key)


def attach(layer: Linear, spec: Spec, key: Key[Array, ""], name: str = NAME) -> None:
    """Attaches a new adapter to a layer with a frozen kernel, and makes it the active one."""
    w = layer.kernel.get_value()
    params, base = spec.method.start(Shape(*w.shape), spec, w, key)
    layer.attached[name] = Adapter(spec, params)
    activate(layer, name)
    if base is not w:
        layer.freeze(base)


def activate(layer: Linear, name: str | None) -> None:
    """Has one attached adapter compute and train, and no other; with None, none does."""
    layer.active = name
    for each, adapter in layer.attached.items():
        adapter.set_trains(each == name)


def cost_of(layer: Linear) -> Cost:
    """Returns what the active adapter of a layer costs; the layer may be of shapes."""
    spec = layer.adapter.spec
    return spec.method.cost(Shape(layer.in_features, layer.out_features), spec)


def merged_kernel(layer: Linear) -> Float[Array, "k n"]:
    """Returns the kernel with the active adapter in it, rounded once to the kernel's dtype."""
    kernel = layer.kernel.get_value()
    if layer.merged:
        return dense(kernel)
    spec = layer.adapter.spec
    return spec.method.merged(spec, kernel, layer.adapter.params).astype(kernel.dtype)


def unmerged_kernel(layer: Linear) -> Float[Array, "k n"]:
    """Returns the kernel of a merged layer without its adapter, rounded to the kernel's dtype."""
    kernel = layer.kernel.get_value()
    spec = layer.adapter.spec
    return spec.method.unmerged(spec, kernel, layer.adapter.params).astype(kernel.dtype)
