"""The operands of a group of linear layers that read one input."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array, Float

from lorax_kernels.weights import Matrix, computed_after, dense


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["w", "a", "b", "bias", "factor"],
    meta_fields=["scale"],
)
@dataclasses.dataclass(frozen=True)
class LoraWeights:
    """One linear layer: frozen weight and bias, and its low-rank update if it has one.

    It computes ``factor · (x·w + scale · (x·a)·b) + bias``.

    A pytree of its arrays; the scale is static.

    Attributes:
        w: Frozen weight, an array or a `Weight`.
        a: Down-projection to the rank r, or None for a layer without an update.
        b: Up-projection from the rank r.
        bias: Frozen bias.
        scale: ``alpha / r``, or ``alpha / √r`` under rank stabilisation.
        factor: Trained factor of every column, or None for 1.
    """

    w: Matrix
    a: Float[Array, "k r"] | None = None
    b: Float[Array, "r n"] | None = None
    bias: Float[Array, " n"] | None = None
    scale: float = 1.0
    factor: Float[Array, " n"] | None = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["w", "biases", "factors", "a", "b", "key"],
    meta_fields=["members", "scales", "rate", "implementation", "axes"],
)
@dataclasses.dataclass(frozen=True)
class Group:
    """The operands of layers that read one input, those of the updates without gaps.

    A pytree of its arrays; the rest is static.

    Attributes:
        w: Per member, a `Matrix`; `multiplied_in` converts them to arrays.
        biases: Per member, or None.
        factors: Per member, or None.
        a: Per update.
        b: Per update.
        key: Dropout key, or None without dropout.
        members: Which members carry an update.
        scales: Per update.
        rate: Dropout rate.
        implementation: ``pallas`` or ``xla``.
        axes: Axes of the mesh, where the kernel runs inside shard_map.
    """

    w: Sequence[Any]
    biases: Sequence[jax.Array | None]
    factors: Sequence[jax.Array | None]
    a: Sequence[jax.Array]
    b: Sequence[jax.Array]
    key: jax.Array | None
    members: tuple[int, ...]
    scales: tuple[float, ...]
    rate: float
    implementation: str
    axes: tuple[str, ...]

    @classmethod
    def of(
        cls,
        layers: Sequence[LoraWeights],
        rate: float,
        key: jax.Array | None,
        implementation: str,
        axes: tuple[str, ...] = (),
    ) -> "Group":
        """Returns the group of some layers; without an update it has no dropout."""
        members = tuple(i for i, layer in enumerate(layers) if layer.a is not None)
        return cls(
            w=[layer.w for layer in layers],
            biases=[layer.bias for layer in layers],
            factors=[layer.factor for layer in layers],
            a=[layer.a for layer in layers if layer.a is not None],
            b=[layer.b for layer in layers if layer.b is not None],
            key=key if members and rate else None,
            members=members,
            scales=tuple(float(layers[i].scale) for i in members),
            rate=rate if members else 0.0,
            implementation=implementation,
            axes=axes,
        )

    def multiplied_in(self, dtype: jax.typing.DTypeLike) -> "Group":
        """Returns the group with its frozen weights as arrays of the dtype of the matmuls."""
        return dataclasses.replace(self, w=[dense(w, dtype) for w in self.w])

    def computed_after(self, after: Any) -> "tuple[Group, Any]":
        """Returns the group, its dense matrices not there before `after` is, and `after`.

        See `lorax_kernels.weights.computed_after`.
        """
        w, after = computed_after(self.w, after)
        return dataclasses.replace(self, w=w), after

    def without_factors(self) -> "Group":
        """Returns the group whose outputs are what the factors multiply."""
        return dataclasses.replace(self, factors=[None] * len(self.factors))

    @property
    def has_factors(self) -> bool:
        """Whether a member has a factor."""
        return any(factor is not None for factor in self.factors)

    @property
    def is_kernel(self) -> bool:
        """Whether the kernels run, instead of XLA."""
        return self.implementation == "pallas"

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of every update."""
        return tuple(a.shape[1] for a in self.a)

    def adapter(self, member: int) -> int:
        """Returns which update belongs to `member`."""
        return self.members.index(member)

    def columns(self, member: int) -> slice | None:
        """Returns the member's columns of ``x·[A₁|A₂|…]``, or None if it has no update."""
        if member not in self.members:
            return None
        index = self.adapter(member)
        start = sum(self.ranks[:index])
        return slice(start, start + self.ranks[index])
