"""The protocol of an adapter method: pure functions on arrays, independent of module libraries."""

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
    """A parameter in PEFT's files: the end of its key, and whether it is transposed there."""

    suffix: str
    transposed: bool


class Cost(NamedTuple):
    """The cost of one adapted layer.

    Attributes:
        parameters: Elements that train.
        kept: Elements stored for the backward pass per token, without the layer's input.
        streamed: Elements per token that the narrow matmuls read: the layer's input and output.
    """

    parameters: int
    kept: int
    streamed: int


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
        """Its parameters, and their keys in PEFT's files."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """Its fields in adapter_config.json."""
        ...

    def claims(self, config: Any) -> bool:
        """Says whether a `LoraConfig` asks for this method."""
        ...

    def identity(self, spec: Spec) -> str:
        """Returns the part of a layer's adapter that a resumed run must share."""
        ...

    def shapes(self, shape: Shape, spec: Spec) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of a layer's parameters."""
        ...

    def start(
        self, shape: Shape, spec: Spec, w: Matrix, key: Key[Array, ""]
    ) -> tuple[dict[str, Array], Matrix]:
        """Returns the first values, which do not change the layer's output, and W.

        W differs where the method moves a part of it into its parameters.
        """
        ...

    def operands(self, spec: Spec, w: Matrix, params: Params) -> LoraWeights | None:
        """Returns the kernels' operands, alone or in a group; None if there is only `apply`."""
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
        """Returns the adapted layer's output in `x`'s dtype; this defines the method."""
        ...

    def merged(self, spec: Spec, w: Matrix, params: Params) -> Float[Array, "k n"]:
        """Returns the W' in float32 with which a plain layer gives the same output."""
        ...

    def unmerged(self, spec: Spec, w: Matrix, params: Params) -> Float[Array, "k n"]:
        """Returns the W in float32 for which `merged` returned `w`, up to rounding."""
        ...

    def portable(self, spec: Spec, params: Params, rank: int) -> dict[str, np.ndarray]:
        """Returns equivalent parameters of plain LoRA of some rank, with the scale 1.

        Raises:
            ValueError: If there are none.
        """
        ...

    def cost(self, shape: Shape, spec: Spec) -> Cost:
        """Returns the cost of a layer with it."""
        ...

    def parts(self, base: PartitionSpec) -> dict[str, PartitionSpec]:
        """Returns the partition of each parameter, given that of W."""
        ...
