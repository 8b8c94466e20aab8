"""The protocol of a stored frozen matrix, as operations use it."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


@runtime_checkable
class Weight(Protocol):
    """A frozen matrix that is not stored as one dense array.

    It is a pytree of its stored arrays; all else is static.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """The matrix's shape, (k, n)."""
        ...

    @property
    def dtype(self) -> DTypeLike:
        """The dtype of its matmuls, unless another is requested."""
        ...

    @property
    def kernel_obstacle(self) -> str | None:
        """Why the fused kernel cannot read it, as the end of a sentence; None if it can."""
        ...

    def dense(self, dtype: DTypeLike | None = None) -> Float[Array, "k n"]:
        """Returns the dense matrix, the value of the stored arrays. None is its own dtype."""
        ...


type Matrix = Float[Array, "k n"] | Weight
"""A frozen matrix: one dense array, or a `Weight`."""


def dense(w: Matrix, dtype: DTypeLike | None = None) -> Float[Array, "k n"]:
    """Returns a matrix as one array, in `dtype` if one is given."""
    if isinstance(w, Weight):
        return w.dense(dtype)
    return w if dtype is None else w.astype(dtype)


def kernel_obstacle(w: Matrix) -> str | None:
    """Returns why the fused kernel cannot read the stored form of a matrix, or None if it can."""
    return w.kernel_obstacle if isinstance(w, Weight) else None


def computed_after(weights: Sequence[Matrix], after: Any) -> tuple[Sequence[Matrix], Any]:
    """Returns both unchanged, but the dense matrices are computed only once `after` is there.

    Otherwise the compiler sees that both passes compute the same matrix, and keeps the forward
    pass's copy for the backward pass; and it may compute many of them ahead, since they depend on
    no activation. Either way the whole dense model would be in memory.

    Args:
        weights: The matrices of a pass.
        after: Arrays that are there just before: activations, or in the backward pass cotangents.
    """
    if not any(isinstance(w, Weight) for w in weights):
        return weights, after
    return jax.lax.optimization_barrier((weights, after))
