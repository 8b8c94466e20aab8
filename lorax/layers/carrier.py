"""Layers that carry adapters: their state, and what an adapted layer computes."""

import functools
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from lorax.layers.maps import Map, TokenRows, Way, apply_map
from lorax_kernels import Kernels, LoraWeights, Matrix


class Frozen(nnx.Variable):
    """A weight that training never changes. `nnx.Param` is what trains."""


class Update(Protocol):
    """What an adapter makes of its layer."""

    @property
    def dropout(self) -> float:
        """Probability with which an element of the adapter's input is dropped in training."""
        ...

    def key(self) -> Key[Array, ""]:
        """Returns the key that decides the dropout mask.

        Raises:
            ValueError: If none was set.
        """
        ...

    def operands(self, w: Matrix) -> LoraWeights | TokenRows:
        """Returns what computes W and its update; the bias is the adapter's own."""
        ...


class Carrier(nnx.Module):
    """State of a layer that can carry adapters, mixed into a class of Flax's.

    *Adapted* is a state of the layer. Without an active adapter it computes what its base does.
    What computes with a layer is a function and no method, because `nnx.tabulate` traces every
    method and accepts arrays only.

    Attributes:
        attached: The adapters by name.
        active: Name of the one that computes; None: the layer is its base.
        merged: Whether the kernel holds the active adapter's update already.
        kernels: What computes an adapted layer: see `lorax_kernels.lora_linear`.
        deterministic: Whether dropout is off; `model.train()` and `model.eval()` set it.
    """

    flax_class: ClassVar[type[nnx.Module]]
    """The class of Flax's."""

    weight_name: ClassVar[str] = "kernel"
    """The attribute that holds the kernel."""

    attached: nnx.Dict
    active: str | None
    merged: bool
    deterministic: bool
    kernels: Kernels
    bias: Any
    dtype: Any
    preferred_element_type: Any

    @property
    def linear_map(self) -> Map:
        """The linear map that its kernel is the matrix of."""
        raise NotImplementedError

    def begin(self) -> None:
        """Sets the state of a layer without adapters."""
        self.attached = nnx.Dict()
        self.active = None
        self.merged = False
        self.deterministic = False
        self.kernels = "auto"

    @property
    def matrix(self) -> Any:
        """The kernel as W, (k, n), after the axes of stacked layers."""
        kernel = getattr(self, self.weight_name).get_value()
        if isinstance(kernel, jax.ShapeDtypeStruct):
            return jax.eval_shape(self.linear_map.matrix, kernel)
        return self.linear_map.matrix(kernel)

    def freeze(self, matrix: Matrix) -> None:
        """Gives the layer a matrix, which training leaves alone."""
        setattr(self, self.weight_name, Frozen(self.linear_map.kernel(matrix)))  # type: ignore[arg-type]

    @property
    def adapter(self) -> Any:
        """The active adapter, or None; merged or not."""
        return None if self.active is None else self.attached[self.active]

    @property
    def computing(self) -> Update | None:
        """The update that takes part in a call now, or None."""
        return None if self.merged or self.adapter is None else self.adapter.update

    @property
    def dropout_rate(self) -> float:
        """Probability of dropping an element of the adapter's input now: 0 unless training."""
        adapter = self.computing
        return 0.0 if adapter is None or self.deterministic else adapter.dropout

    @property
    def kernels_now(self) -> Kernels:
        """The kernels for this call: with `auto`, XLA unless training.

        The shapes of evaluation and generation change from call to call, and compiling a kernel for
        each new shape costs more than it saves.
        """
        return "xla" if self.kernels == "auto" and self.deterministic else self.kernels

    @property
    def way(self) -> Way:
        """How its adapter is computed in this call."""
        rate = self.dropout_rate
        adapter = self.computing
        key = adapter.key() if adapter is not None and rate else None
        return Way(rate, key, self.kernels_now)


def compute_dtype(layer: Any, dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype in which a layer multiplies inputs of `dtype`."""
    return jnp.dtype(layer.dtype or jnp.promote_types(dtype, layer.matrix.dtype))


def apply_adapted(layer: Any, x: Array, residual: Float[Array, "*batch n"] | None = None) -> Array:
    """Returns an adapted layer's output without the layer's bias, plus the residual if given.

    A residual needs the dtype in which outputs are computed and come.
    """
    adapter = layer.computing
    assert adapter is not None
    w = layer.matrix
    operands = adapter.operands(w)
    dtype = compute_dtype(layer, x.dtype)
    return apply_map(layer.linear_map, x, w, operands, layer.way, dtype, residual)


@functools.cache
def class_of(kind: type[Carrier], layer: type) -> type:
    """Returns the class that a layer of Flax's kind, or of a subclass, has as a carrier.

    A subclass stays one, with its own methods; where they call Flax's, they call the carrier's. So
    its class is made here, once.
    """
    if issubclass(layer, Carrier):
        return layer
    if layer is kind.flax_class:
        return kind
    return type(layer.__name__, (layer, kind), {"__module__": layer.__module__})


def carry(kind: type[Carrier], layer: Any) -> Any:
    """Turns a layer of Flax's kind into one that carries adapters, in place; returns it."""
    if not isinstance(layer, Carrier):
        layer.__class__ = class_of(kind, type(layer))
        layer.begin()
    return layer


class Reached(NamedTuple):
    """Whether a subclass's own `__call__` calls that of Flax's class, and reads its kernel."""

    calls: bool
    reads: bool


def reaches_base(kind: type[Carrier], layer: nnx.Module, x: jax.ShapeDtypeStruct) -> Reached:
    """Returns how a subclass's own `__call__` uses that of Flax's class, on inputs like `x`.

    It is traced with a layer in which Flax's call is the original's, so that the kernel is read by
    nothing but the subclass.
    """
    called = []
    read = []

    def own(layer):
        read.append(True)
        return vars(layer)[kind.weight_name]

    def call(layer, original, x):
        def flax_call(_, *args, **kwargs):
            called.append(True)
            return kind.flax_class.__call__(original, *args, **kwargs)  # type: ignore[operator]

        base = type(kind.__name__, (kind,), {"__call__": flax_call})
        parts = {kind.weight_name: property(own, lambda *_: None)}
        layer.__class__ = type("Probe", (type(layer), base), parts)
        return layer(x)

    try:
        nnx.eval_shape(call, nnx.clone(layer), nnx.clone(layer), x)
    except Exception:  # a call with other arguments
        return Reached(bool(called), bool(read))
    return Reached(bool(called), bool(read))
