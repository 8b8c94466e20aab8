"""The directions in which inputs of layers vary, collected while a model runs."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lorax.adapters.eva import (
    Directions,
    converged,
    explained_variance_ratios,
    no_directions,
    update,
)
from lorax.adapters.nnx.recorder import Forward, listen_to
from lorax.layers.carrier import Carrier

type RowMask = Callable[[Any], Bool[Array, "..."]]
"""``batch -> mask``: which rows count, in the shape of the layers' inputs without features."""


class Recording(NamedTuple):
    """What is known of the inputs of one layer.

    Attributes:
        directions: Their components.
        ratios: Each component's share of the variance.
        converged: Whether each kept its direction when rows came last.
        active: Whether further rows count.
    """

    directions: Directions
    ratios: Float[Array, " c"]
    converged: Bool[Array, " c"]
    active: Bool[Array, ""]


class Recorded(nnx.Variable):
    """The `Recording` of a layer."""


class Found(NamedTuple):
    """What is read of a `Recording` after a batch."""

    ratios: Float[Array, " c"]
    converged: Bool[Array, " c"]
    seen: Int[Array, ""]


def _empty(components: int, k: int) -> Recording:
    state = no_directions(components, k)
    ratios = explained_variance_ratios(state)
    return Recording(state, ratios, jnp.zeros(components, bool), jnp.ones((), bool))


@functools.partial(jax.jit, static_argnames="tau")
def _after(before: Recording, x: Array, mask: Array, tau: float) -> Recording:
    """Returns the recording after more rows; jitted, so that layers of one shape share a trace."""

    def more(before: Recording) -> Recording:
        old = before.directions
        new = update(old, x, mask)
        kept = jnp.where(new.seen > old.seen, converged(old, new, tau), before.converged)
        return Recording(new, explained_variance_ratios(new), kept, before.active)

    return jax.lax.cond(before.active, more, lambda before: before, before)


class Collector:
    """Runs a model on batches, and collects the directions of some layers' inputs.

    No input is stored: the compiled function of a batch updates the directions. A batch of another
    shape is compiled anew.

    Args:
        model: The model; its layers change in place.
        layers: The layers by name.
        components: How many components each has.
        forward: Runs the model.
        mask: Which rows count; None: all.
        tau: The cosine at which a component has converged.
    """

    def __init__(
        self,
        model: nnx.Module,
        layers: Mapping[str, Carrier],
        components: Mapping[str, int],
        forward: Forward,
        mask: RowMask | None,
        tau: float,
    ):
        self._layers: dict[str, Any] = dict(layers)
        self._mask: Array | None = None
        self._tau = tau
        for name, layer in self._layers.items():
            layer.recorded = Recorded(_empty(components[name], layer.linear_map.shape[0]))
        listen_to(layers, self._hear)
        graph, _, self._rest = nnx.split(model, Recorded, ...)
        self._model = model

        @jax.jit
        def step(recorded, rest, batch):
            run = nnx.merge(graph, recorded, rest)
            self._mask = None if mask is None else mask(batch)
            counted = jnp.ones((), bool) if self._mask is None else self._mask.any()
            forward(run, batch)
            self._mask = None
            return nnx.state(run, Recorded), counted

        self._step = step

    def _hear(self, name: str, layer: Any, x: Array) -> None:
        rows = layer.linear_map.rows(x)
        mask = jnp.ones(rows.shape[:-1], bool) if self._mask is None else self._mask
        if mask.shape != rows.shape[:-1]:
            raise ValueError(
                f"{name}: the mask is {mask.shape}, and the layer's inputs are {rows.shape[:-1]} "
                f"rows of {rows.shape[-1]} features: give a mask of that shape, or leave the layer "
                "out with lora.exclude_modules"
            )
        flat = rows.reshape(-1, rows.shape[-1])
        before = layer.recorded.get_value()
        layer.recorded.set_value(_after(before, flat, mask.reshape(-1), self._tau))

    def run(self, batch: Any) -> dict[str, Found]:
        """Runs the model on a batch, and returns what is known of each layer then.

        Raises:
            ValueError: If the mask does not fit a layer's inputs, or inputs do not arrive.
        """
        recorded, counted = self._step(nnx.state(self._model, Recorded), self._rest, batch)
        nnx.update(self._model, recorded)
        values = {name: layer.recorded.get_value() for name, layer in self._layers.items()}
        found = jax.device_get(
            {n: Found(v.ratios, v.converged, v.directions.seen) for n, v in values.items()}
        )
        for name, each in found.items():
            if counted and not each.seen:
                raise ValueError(
                    f"the inputs of {name} do not arrive: forward runs it within a transform of "
                    "jax, such as jax.checkpoint, which loses what changes; use that of flax.nnx"
                )
        return found

    def go_on_with(self, names: Iterable[str]) -> None:
        """Has further batches change these layers' directions alone."""
        names = set(names)
        for name, layer in self._layers.items():
            active = jnp.asarray(name in names)
            layer.recorded.set_value(layer.recorded.get_value()._replace(active=active))

    def directions(self, name: str) -> Directions:
        """Returns a layer's directions."""
        return self._layers[name].recorded.get_value().directions
