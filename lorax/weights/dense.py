"""The dense format: the matrix as one array."""

import math
from types import MappingProxyType

import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

import lorax_kernels
from lorax.config.model import ModelConfig


class _Dense:
    """One array in the dtype that it is multiplied in; see `Format`."""

    name = "dense"
    files = MappingProxyType({"matrix": "weight"})

    def claims(self, model: ModelConfig) -> bool:
        return True

    def store(self, matrix: Float[Array, "k n"]) -> Float[Array, "k n"]:
        return matrix

    def dense(
        self, stored: Float[Array, "k n"], dtype: DTypeLike | None = None
    ) -> Float[Array, "k n"]:
        return lorax_kernels.dense(stored, dtype)

    def bytes(self, shape: tuple[int, int], dtype: DTypeLike) -> int:
        return math.prod(shape) * jnp.dtype(dtype).itemsize

    def parts(self, spec: PartitionSpec) -> tuple[PartitionSpec, ...]:
        return (spec,)

    def obstacle(self, shape: tuple[int, int], dtype: DTypeLike) -> str | None:
        return None


DENSE = _Dense()
