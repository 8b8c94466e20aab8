"""Kinds of layers that can carry an adapter, each with its matrix (k, n)."""

from typing import Any, NamedTuple, Protocol

from flax import nnx

from lorax.adapters.method import Shape
from lorax.layers.linear import Linear, obstacle


class Obstacle(NamedTuple):
    """Why a layer of a kind that carries adapters cannot carry one."""

    reason: str


class Site(Protocol):
    """A kind of layer that multiplies by a weight, seen as (k, n).

    To add one: an object like this, an entry in `SITES`.
    """

    def find(self, module: Any) -> Shape | Obstacle | None:
        """Returns the shape of a module's weight, an `Obstacle`, or None for other modules."""
        ...

    def adopt(self, module: Any) -> Linear:
        """Returns the layer that replaces such a module and shares its variables."""
        ...


class LinearSite:
    """`nnx.Linear`, with nothing of its own in `__call__`."""

    def find(self, module: Any) -> Shape | Obstacle | None:
        """See `Site`."""
        if not isinstance(module, nnx.Linear):
            return None
        if reason := obstacle(module):
            return Obstacle(reason)
        return Shape(module.in_features, module.out_features)

    def adopt(self, module: Any) -> Linear:
        """See `Site`."""
        return module if isinstance(module, Linear) else Linear.of(module)


SITES: list[Site] = [LinearSite()]


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
