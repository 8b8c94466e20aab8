"""The directions in which inputs of layers vary, collected while an NNX model runs."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from lorax.adapters.eva import Directions
from lorax.adapters.nnx.recorder import Forward, listen_to
from lorax.adapters.recording import Found, RowMask, no_recording, read, with_input
from lorax.layers.carrier import Carrier


class Recorded(nnx.Variable):
    """The `Recording` of a layer."""


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
            layer.recorded = Recorded(no_recording(components[name], layer.linear_map.shape[0]))
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
        before = layer.recorded.get_value()
        after = with_input(before, x, self._mask, name, layer.linear_map, self._tau)
        layer.recorded.set_value(after)

    def run(self, batch: Any) -> dict[str, Found]:
        """Runs the model on a batch, and returns what is known of each layer then.

        Raises:
            ValueError: If the mask does not fit a layer's inputs, or inputs do not arrive.
        """
        recorded, counted = self._step(nnx.state(self._model, Recorded), self._rest, batch)
        nnx.update(self._model, recorded)
        recordings = {name: layer.recorded.get_value() for name, layer in self._layers.items()}
        return read(
            recordings,
            counted,
            "forward runs it within a transform of jax, such as jax.checkpoint, which loses what "
            "changes; use that of flax.nnx",
        )

    def go_on_with(self, names: Iterable[str]) -> None:
        """Has further batches change these layers' directions alone."""
        names = set(names)
        for name, layer in self._layers.items():
            active = jnp.asarray(name in names)
            layer.recorded.set_value(layer.recorded.get_value()._replace(active=active))

    def directions(self, name: str) -> Directions:
        """Returns a layer's directions."""
        return self._layers[name].recorded.get_value().directions
