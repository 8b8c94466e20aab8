"""The NF4 format: four bits an element and one scale per block of 64."""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType

from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lorax.config.model import ModelConfig
from lorax.weights.format import axes_of
from lorax_kernels.weights.nf4 import Nf4, quantise
from lorax_kernels.weights.nf4.levels import BLOCK, NESTED_BLOCK
from lorax_kernels.weights.nf4.order import obstacle

_FILES = {
    "codes": "weight",
    "absmax": "weight.absmax",
    "levels": "weight.quant_map",
    "state": "weight.quant_state.bitsandbytes__nf4",
}
_NESTED_FILES = {
    "nested_absmax": "weight.nested_absmax",
    "nested_levels": "weight.nested_quant_map",
}


@dataclasses.dataclass(frozen=True)
class _Nf4:
    """bitsandbytes' NF4, which a kernel dequantises on Hopper GPUs; see `Format`.

    Attributes:
        double: Quantises the scales too, to eight bits.
    """

    double: bool

    @property
    def name(self) -> str:
        return "nf4_double" if self.double else "nf4"

    @property
    def files(self) -> Mapping[str, str]:
        return MappingProxyType(_FILES | (_NESTED_FILES if self.double else {}))

    def claims(self, model: ModelConfig) -> bool:
        return model.quantization == self.name

    def store(self, matrix: Float[Array, "k n"]) -> Nf4:
        return quantise(matrix, double=self.double)

    def dense(self, stored: Nf4, dtype: DTypeLike | None = None) -> Float[Array, "k n"]:
        return stored.dense(dtype)

    def bytes(self, shape: tuple[int, int], dtype: DTypeLike) -> int:
        elements = math.prod(shape)
        blocks = -(-elements // BLOCK)
        codes = -(-elements // 2)
        if not self.double:
            return codes + 4 * blocks
        return codes + blocks + 4 * -(-blocks // NESTED_BLOCK) + 4  # the offset

    def parts(self, spec: PartitionSpec) -> tuple[PartitionSpec, ...]:
        # A device's part of k must consist of whole blocks, and its part of n of pairs.
        blocks = PartitionSpec(*axes_of(spec))
        nested = (PartitionSpec(), PartitionSpec()) if self.double else ()
        return blocks, blocks, *nested

    def obstacle(self, shape: tuple[int, int], dtype: DTypeLike) -> str | None:
        return obstacle(shape)


NF4 = _Nf4(double=False)
NF4_DOUBLE = _Nf4(double=True)
