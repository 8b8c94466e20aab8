"""The operands of a group of linear layers that read one input."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
from jaxtyping import Array, Float


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["w", "a", "b", "bias"], meta_fields=["scale"]
)
@dataclasses.dataclass(frozen=True)
class LoraWeights:
    """One linear layer: frozen weight and bias, and its low-rank update if it has one.

    A pytree of its arrays; the scale is static.

    Attributes:
        w: Frozen weight.
        a: Down-projection to the rank r, or None for a layer without an update.
        b: Up-projection from the rank r.
        bias: Frozen bias.
        scale: ``alpha / r``, or ``alpha / √r`` under rank stabilisation.
    """

    w: Float[Array, "k n"]
    a: Float[Array, "k r"] | None = None
    b: Float[Array, "r n"] | None = None
    bias: Float[Array, " n"] | None = None
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Group:
    """The members' operands, those of the updates without gaps.

    Attributes:
        w: Per member.
        biases: Per member, or None.
        members: Which members carry an update.
        a: Per update.
        b: Per update.
        scales: Per update.
    """

    w: Sequence[jax.Array]
    biases: Sequence[jax.Array | None]
    members: tuple[int, ...]
    a: Sequence[jax.Array]
    b: Sequence[jax.Array]
    scales: tuple[float, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Returns the rank of every update."""
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
