"""Kinds of layers that can carry an adapter, each with its matrix (k, n)."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from lorax.adapters.method import Shape
from lorax.layers import conv, embed, general, linear
from lorax.layers.carrier import Carrier, carry, class_of, reaches_base


class Obstacle(NamedTuple):
    """Why a layer of a kind that carries adapters cannot carry one."""

    reason: str


class Site(Protocol):
    """A kind of layer that multiplies by a weight, seen as (k, n).

    To add one: an object like this, an entry in `SITES`.
    """

    @property
    def by_name_only(self) -> bool:
        """Whether ``all-linear`` leaves such layers out."""
        ...

    def find(self, module: Any) -> Shape | Obstacle | None:
        """Returns the shape of a module's weight, an `Obstacle`, or None for other modules."""
        ...

    def adopt(self, module: Any) -> Any:
        """Returns the `Carrier` that stands for such a module, with its variables.

        It may be the module itself, changed.
        """
        ...


@dataclasses.dataclass(frozen=True)
class FlaxSite:
    """A class of Flax's and its subclasses.

    Attributes:
        kind: The class that carries adapters.
        obstacle: Returns why a layer cannot carry one, or None.
        by_name_only: See `Site`.
    """

    kind: type[Carrier]
    obstacle: Callable[[Any], str | None]
    by_name_only: bool = False

    def find(self, module: Any) -> Shape | Obstacle | None:
        """See `Site`."""
        if not isinstance(module, self.kind.flax_class):
            return None
        if reason := self._reason(module):
            return Obstacle(reason)
        return Shape(*linear_map_of(self.kind, module).shape)

    def adopt(self, module: Any) -> Carrier:
        """See `Site`."""
        return carry(self.kind, module)

    def _reason(self, module: Any) -> str | None:
        if reason := self.obstacle(module):
            return reason
        calls = (self.kind.flax_class.__call__, self.kind.__call__)  # type: ignore[operator]
        if type(module).__call__ in calls or isinstance(module, Carrier):
            return None
        x = _example_of(linear_map_of(self.kind, module), module)
        reached = reaches_base(self.kind, module, x)
        name = self.kind.flax_class.__name__
        if not reached.calls:
            return f"it has a __call__ of its own that does not call that of nnx.{name}"
        if reached.reads:
            weight = self.kind.weight_name
            return (
                f"it has a __call__ of its own that reads its {weight}, which merging would change"
            )
        return None


def linear_map_of(kind: type[Carrier], module: Any) -> Any:
    """Returns the linear map of a layer of Flax's, which is not changed."""
    carried = class_of(kind, type(module))
    return carried.linear_map.fget(module)  # type: ignore[attr-defined]


def _example_of(linear_map: Any, module: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape of a smallest input."""
    dtype = getattr(module, "dtype", None) or module.param_dtype
    match linear_map.kind:
        case "lookup":
            return jax.ShapeDtypeStruct((1,), jnp.int32)
        case "convolution":
            return jax.ShapeDtypeStruct((1, *linear_map.window, linear_map.inputs), dtype)
        case _:
            return jax.ShapeDtypeStruct((1, 1, *linear_map.inputs), dtype)


SITES: list[Site] = [
    FlaxSite(linear.Linear, linear.obstacle),
    FlaxSite(general.LinearGeneral, general.general_obstacle),
    FlaxSite(general.Einsum, general.einsum_obstacle),
    FlaxSite(embed.Embed, embed.embed_obstacle, by_name_only=True),
    FlaxSite(conv.Conv, conv.conv_obstacle, by_name_only=True),
]


def find_site(module: Any) -> tuple[Site, Shape | Obstacle] | None:
    """Returns the site of a module, and the result of its `find`."""
    for site in SITES:
        if (found := site.find(module)) is not None:
            return site, found
    return None


def shape_of(module: Any) -> Shape | None:
    """Returns the shape of the weight of a module that can carry an adapter, else None."""
    found = find_site(module)
    return found[1] if found is not None and isinstance(found[1], Shape) else None


def obstacle_of(module: Any) -> str | None:
    """Returns why a module of a kind that carries adapters cannot carry one, else None."""
    found = find_site(module)
    return found[1].reason if found is not None and isinstance(found[1], Obstacle) else None


def is_by_name_only(module: Any) -> bool:
    """Says whether ``all-linear`` leaves out layers like a module."""
    found = find_site(module)
    return found is not None and found[0].by_name_only
