"""What an operation asks of a frozen matrix, whatever it is stored as."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


@runtime_checkable
class Weight(Protocol):
    """A frozen matrix that is stored as something else than one array.

    It is a pytree of the arrays that it is stored in; all else is static.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(k, n), of the matrix."""
        ...

    @property
    def dtype(self) -> DTypeLike:
        """What the matrix is multiplied in, unless it is asked for in another dtype."""
        ...

    @property
    def kernel_obstacle(self) -> str | None:
        """Why the fused kernel cannot read it, as the end of a sentence; None if it can."""
        ...

    def dense(self, dtype: DTypeLike | None = None) -> Float[Array, "k n"]:
        """Returns the matrix: this is what the stored arrays mean. None is its own dtype."""
        ...


type Matrix = Float[Array, "k n"] | Weight
"""A frozen matrix: one array, or stored otherwise."""


def dense(w: Matrix, dtype: DTypeLike | None = None) -> Float[Array, "k n"]:
    """Returns a matrix as one array, in `dtype` if one is given."""
    if isinstance(w, Weight):
        return w.dense(dtype)
    return w if dtype is None else w.astype(dtype)


def kernel_obstacle(w: Matrix) -> str | None:
    """Returns why the fused kernel cannot read how a matrix is stored, or None if it can."""
    return w.kernel_obstacle if isinstance(w, Weight) else None


def recomputed(weights: Sequence[Matrix], after: Any) -> tuple[Sequence[Matrix], Any]:
    """Returns both as they are, but has a backward pass make its own dense matrices.

    The compiler finds that both passes make the same matrix, and would keep the forward pass's copy
    for the backward pass: of every layer, the size of the model that was not to be in memory. So
    the stored arrays are not to be had before `after` is.

    Args:
        weights: What the backward pass multiplies by.
        after: Arrays that the forward pass does not have: cotangents.
    """
    if not any(isinstance(w, Weight) for w in weights):
        return weights, after
    return jax.lax.optimization_barrier((weights, after))
