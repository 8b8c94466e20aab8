"""The protocol of a format, for loader, planner and mesh; `formats.py` lists the formats."""

from collections.abc import Mapping
from typing import Any, Protocol

from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lorax.config.model import ModelConfig
from lorax_kernels import Matrix


class Format(Protocol):
    """A format of a stored frozen matrix (k, n): pure functions, and no state.

    It is hashable, so that it can be static in a compiled function.
    """

    @property
    def name(self) -> str:
        """The format's name."""
        ...

    @property
    def files(self) -> Mapping[str, str]:
        """Names of its parts in checkpoints of this format, after the layer's name."""
        ...

    def claims(self, model: ModelConfig) -> bool:
        """Says whether the settings of a model ask for this format."""
        ...

    def store(self, matrix: Float[Array, "k n"]) -> Matrix:
        """Returns a matrix in this format, to be multiplied in its dtype."""
        ...

    def dense(self, stored: Any, dtype: DTypeLike | None = None) -> Float[Array, "k n"]:
        """Returns the dense matrix, which defines the format. None is its own dtype."""
        ...

    def bytes(self, shape: tuple[int, int], dtype: DTypeLike) -> int:
        """Returns the bytes of a matrix that is multiplied in `dtype`."""
        ...

    def parts(self, spec: PartitionSpec) -> tuple[PartitionSpec, ...]:
        """Returns the partition of each stored array, in the order of `jax.tree.leaves`.

        Args:
            spec: The partition of the matrix.
        """
        ...

    def obstacle(self, shape: tuple[int, int], dtype: DTypeLike) -> str | None:
        """Returns why the fused kernel cannot read a matrix in this format, or None if it can."""
        ...


def axes_of(spec: PartitionSpec) -> tuple[Any, Any]:
    """Returns the mesh axes that divide the rows and the columns of a matrix."""
    rows, columns = (*spec, None, None)[:2]
    return rows, columns
