"""The protocol of an adapter method: pure functions on arrays, independent of module libraries."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Key

from lorax.layers.maps import Map, TokenRows
from lorax_kernels import LoraWeights, Matrix, dense

type Params = Mapping[str, Array]
"""One layer's values by name."""


class Shape(NamedTuple):
    """The matrix W of a layer, (k, n): `inputs` × `outputs`."""

    inputs: int
    outputs: int


class Parameter(NamedTuple):
    """A trained parameter of a layer.

    Attributes:
        suffix: The end of its key in PEFT's files of linear layers.
        axes: A letter per axis: ``k`` inputs, ``n`` outputs, ``r`` rank, ``t`` tokens. Files hold
            the transpose.
    """

    suffix: str
    axes: str


class Cost(NamedTuple):
    """The cost of one adapted layer.

    Attributes:
        parameters: Elements that train.
        kept: Elements stored for the backward pass per token, without the layer's input.
        streamed: Elements per token that the narrow matmuls read: the layer's input and output.
        products: Elements of the output before its factors, stored for their gradient per token.
    """

    parameters: int
    kept: int
    streamed: int
    products: int = 0


@dataclasses.dataclass(frozen=True)
class Spec:
    """The adapter of one layer.

    Attributes:
        method: Its method.
        r: Its rank.
        lora_alpha: Numerator of its scale.
        scale: Factor on the update.
        dropout: Probability of dropping an element of its input in training.
        start: Initialisation: `LoraConfig.init_lora_weights`.
        tokens: The tokens whose rows train; see `lorax.adapters.tokens`.
    """

    method: "Method"
    r: int
    lora_alpha: float
    scale: float
    dropout: float = 0.0
    start: bool | str = True
    tokens: tuple[int, ...] = ()

    @property
    def use_rslora(self) -> bool:
        """Whether the scale is ``lora_alpha / √r``."""
        return self.scale != self.lora_alpha / self.r


class Start(NamedTuple):
    """What a layer's adapter begins with.

    Attributes:
        params: The first values of what trains, float32.
        fixed: Further values that the method needs and that do not train, by name.
    """

    params: dict[str, Array]
    fixed: dict[str, Array]


class Method(Protocol):
    """An adapter method. To add one: a file with an object like this, an entry in `METHODS`.

    W is the layer's frozen matrix, (k, n), an array or stored otherwise; `values` are those of one
    layer, what trains and what is fixed, float32.
    """

    @property
    def name(self) -> str:
        """The method's name."""
        ...

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """What trains, by name."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """Its fields in adapter_config.json."""
        ...

    @property
    def has_factor(self) -> bool:
        """Whether a trained factor multiplies every column of the output."""
        ...

    def claims(self, config: Any) -> bool:
        """Says whether a `LoraConfig` asks for this method."""
        ...

    def obstacle(self, spec: Spec, kind: str, shape: Shape) -> str | None:
        """Returns why a layer of a kind cannot carry it, with a remedy, or None.

        Args:
            spec: The adapter.
            kind: Of `lorax.layers.maps`.
            shape: Of its matrix.
        """
        ...

    def identity(self, spec: Spec) -> str:
        """Returns the part of a layer's adapter that a resumed run must share."""
        ...

    def start(self, spec: Spec, w: Matrix, key: Key[Array, ""], kind: str) -> Start:
        """Returns the first values, which do not change the layer's output."""
        ...

    def operands(self, spec: Spec, w: Matrix, values: Params) -> LoraWeights | TokenRows:
        """Returns what computes the adapted layer; this defines the method.

        Its `bias` is the adapter's own, added to the layer's: it has a gradient.
        """
        ...

    def portable(self, spec: Spec, values: Params, rank: int) -> dict[str, np.ndarray]:
        """Returns equivalent parameters of plain LoRA of some rank, with the scale 1.

        Raises:
            ValueError: If there are none.
        """
        ...

    def rank(self, spec: Spec, kind: str) -> int:
        """Returns the rank of the update that is computed, the least one of `portable`."""
        ...

    def plain(self, spec: Spec, values: Params) -> tuple[Spec, Params]:
        """Returns the adapter that does the same without `fixed` values of its start."""
        ...


def shapes_of(spec: Spec, shape: Shape) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of what trains in a layer."""
    sizes = {"k": shape.inputs, "n": shape.outputs, "r": spec.r, "t": len(spec.tokens)}
    return {
        name: tuple(sizes[axis] for axis in parameter.axes)
        for name, parameter in spec.method.parameters.items()
    }


def parts_of(method: Method, base: PartitionSpec) -> dict[str, PartitionSpec]:
    """Returns the partition of each parameter: k and n divided as those of W are, r whole."""
    rows, columns = (*base, None, None)[:2]
    axes = {"k": rows, "n": columns, "r": None, "t": None}
    return {
        name: PartitionSpec(*(axes[axis] for axis in parameter.axes))
        for name, parameter in method.parameters.items()
    }


def cost_of(spec: Spec, shape: Shape, kind: str) -> Cost:
    """Returns the cost of a layer of a kind with an adapter."""
    parameters = sum(math.prod(shape) for shape in shapes_of(spec, shape).values())
    rank = spec.method.rank(spec, kind)
    products = shape.outputs if spec.method.has_factor else 0
    return Cost(parameters, rank, shape.inputs + shape.outputs, products)


def merged(spec: Spec, linear_map: Map, w: Matrix, values: Params) -> Float[Array, "k n"]:
    """Returns ``factor · (W + s·A·B)``, float32: with it a plain layer gives the same output."""
    operands = spec.method.operands(spec, w, values)
    if isinstance(operands, TokenRows):
        return linear_map.replaced(dense(w), operands)
    whole = dense(operands.w, jnp.float32) + _update(operands)
    return whole if operands.factor is None else whole * operands.factor[None, :]


def unmerged(
    spec: Spec, linear_map: Map, w: Matrix, values: Params, factor: Float[Array, " n"] | None
) -> Float[Array, "k n"]:
    """Returns ``W' / factor - s·A·B``, float32: the W for which `merged` returned `w`.

    Args:
        spec: The adapter.
        linear_map: The layer's.
        w: The merged matrix, W'.
        values: The adapter's values.
        factor: The factor that was merged; None is 1.
    """
    operands = spec.method.operands(spec, w, values)
    if isinstance(operands, TokenRows):
        return linear_map.replaced(dense(w), dataclasses.replace(operands, values=operands.own))
    whole = dense(w, jnp.float32)
    if factor is not None:
        whole /= jnp.where(factor == 0, 1, factor)[None, :]
    return whole - _update(operands)


def _update(operands: LoraWeights) -> Array:
    assert operands.a is not None and operands.b is not None
    product = jnp.matmul(operands.a, operands.b, precision="highest")
    return product * jnp.float32(operands.scale)
