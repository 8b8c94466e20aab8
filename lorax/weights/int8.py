"""The int8 format: eight bits an element and one scale per output column."""

from collections.abc import Mapping
from types import MappingProxyType

from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lorax.config.model import ModelConfig
from lorax.weights.format import axes_of
from lorax_kernels.weights.int8 import Int8, quantise


class _Int8:
    """Symmetric eight bits; see `Format`."""

    name = "int8"

    @property
    def files(self) -> Mapping[str, str]:
        return MappingProxyType({"codes": "weight", "scale": "SCB"})

    def claims(self, model: ModelConfig) -> bool:
        return model.quantization == self.name

    def store(self, matrix: Float[Array, "k n"]) -> Int8:
        return quantise(matrix)

    def dense(self, stored: Int8, dtype: DTypeLike | None = None) -> Float[Array, "k n"]:
        return stored.dense(dtype)

    def bytes(self, shape: tuple[int, int], dtype: DTypeLike) -> int:
        k, n = shape
        return k * n + 4 * n

    def parts(self, spec: PartitionSpec) -> tuple[PartitionSpec, ...]:
        return spec, PartitionSpec(axes_of(spec)[1])

    def obstacle(self, shape: tuple[int, int], dtype: DTypeLike) -> str | None:
        return None


INT8 = _Int8()
