"""What an adapter method is: pure functions on arrays, which know no module library."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Key

from lorax_kernels import LoraWeights, Matrix

type Params = Mapping[str, Array]
"""One layer's parameters by name."""


class Shape(NamedTuple):
    """The matrix W of a layer, (k, n): `inputs` × `outputs`."""

    inputs: int
    outputs: int


class FileKey(NamedTuple):
    """How PEFT's files hold a parameter: the end of its key, and whether it is transposed there."""

    suffix: str
    transposed: bool


class Cost(NamedTuple):
    """What one adapted layer costs.

    Attributes:
        parameters: Elements that train.
        kept: Elements that the backward pass finds in memory per token, besides the layer's input.
        streamed: Elements per token of what the narrow products read: the layer's input and output.
    """

    parameters: int
    kept: int
    streamed: int


@dataclasses.dataclass(frozen=True)
class Spec:
    """The adapter of one layer.

    Attributes:
        method: How it changes the layer.
        r: Its rank.
        lora_alpha: Numerator of its scale.
        scale: What the update is multiplied by.
        dropout: Probability of dropping an element of its input in training.
        start: How its first values are drawn: `LoraConfig.init_lora_weights`.
    """

    method: "Method"
    r: int
    lora_alpha: float
    scale: float
    dropout: float = 0.0
    start: bool | str = True


class Method(Protocol):
    """An adapter method. To add one: a file with an object like this, an entry in `METHODS`.

    W is the layer's frozen matrix, (k, n), an array or stored otherwise; `params` are the
    parameters of one layer, float32, with the names of `keys`.
    """

    @property
    def name(self) -> str:
        """The method's name."""
        ...

    @property
    def keys(self) -> Mapping[str, FileKey]:
        """Its parameters, and where PEFT's files hold them."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What adapter_config.json says of the method."""
        ...

    def claims(self, config: Any) -> bool:
        """Says whether a `LoraConfig` asks for this method."""
        ...

    def identity(self, spec: Spec) -> str:
        """Returns what a resumed run must share of a layer's adapter."""
        ...

    def shapes(self, shape: Shape, spec: Spec) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of a layer's parameters."""
        ...

    def start(
        self, shape: Shape, spec: Spec, w: Matrix, key: Key[Array, ""]
    ) -> tuple[dict[str, Array], Matrix]:
        """Returns the first values, with which the layer computes what it did, and W.

        W is another one where the method takes a part of it into its parameters.
        """
        ...

    def operands(self, spec: Spec, w: Matrix, params: Params) -> LoraWeights | None:
        """Returns what the kernels take, alone or in a group; None if `apply` is all there is."""
        ...

    def apply(
        self,
        spec: Spec,
        w: Matrix,
        params: Params,
        x: Float[Array, "*batch k"],
        dropout_rate: float,
        dropout_key: Key[Array, ""] | None,
    ) -> Float[Array, "*batch n"]:
        """Returns x·W and what the adapter makes of it, in `x`'s dtype: this is its definition."""
        ...

    def merged(self, spec: Spec, w: Matrix, params: Params) -> Float[Array, "k n"]:
        """Returns the W' in float32 with which a plain layer computes the same."""
        ...

    def unmerged(self, spec: Spec, w: Matrix, params: Params) -> Float[Array, "k n"]:
        """Returns the W in float32 that `merged` made `w` of, up to rounding."""
        ...

    def portable(self, spec: Spec, params: Params, rank: int) -> dict[str, np.ndarray]:
        """Returns the parameters of plain LoRA of some rank, with the scale 1, that do the same.

        Raises:
            ValueError: If there are none.
        """
        ...

    def cost(self, shape: Shape, spec: Spec) -> Cost:
        """Returns what a layer with it costs."""
        ...

    def parts(self, base: PartitionSpec) -> dict[str, PartitionSpec]:
        """Returns how each parameter is divided where W is divided so."""
        ...
