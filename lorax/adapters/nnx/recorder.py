"""Layers of a model that tell their inputs to a listener."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from lorax.adapters.nnx.apply import adopt
from lorax.adapters.nnx.tree import module_references, named_modules
from lorax.layers.carrier import Carrier

type Listener = Callable[[str, Any, Array], None]
"""``(name, layer, x)``: is called with each input of a layer, before the layer computes."""

type Forward = Callable[[Any, Any], Any]
"""``(model, batch)``: runs a model on a batch; what it returns is not read."""


class Recorder(Carrier):
    """Mixed into the class of a layer, below the methods of a user's subclass.

    Attributes:
        heard_as: The layer's name. It tells layers of one structure apart, so each is traced.
        listener: What is told its inputs.
    """

    heard_as: str
    listener: Listener

    def __call__(self, inputs: Array, *arguments: Any, **options: Any) -> Array:
        """Tells the input, and computes what the layer does."""
        self.listener(self.heard_as, self, inputs)
        return super().__call__(inputs, *arguments, **options)  # type: ignore[misc]


def carriers_of(model: nnx.Module, names: Iterable[str]) -> dict[str, Carrier]:
    """Turns layers of a model into carriers, in place, and returns them by name."""
    modules = named_modules(model)
    references = module_references(model)
    return {name: adopt(name, modules, references) for name in names}


def listen_to(layers: Mapping[str, Carrier], listener: Listener) -> None:
    """Has layers tell a listener their inputs, in place."""
    for name, layer in layers.items():
        recorder: Any = layer
        recorder.__class__ = _recording(type(layer))
        recorder.heard_as = name
        recorder.listener = listener


@functools.cache
def _recording(layer: type) -> type:
    """Returns the class of a layer that records."""
    if issubclass(layer, Recorder):
        return layer
    kind = next((each for each in layer.__mro__ if "flax_class" in vars(each)), layer)
    recording = type(kind.__name__, (Recorder, kind), {"__module__": kind.__module__})
    if layer is kind:
        return recording
    return type(layer.__name__, (layer, recording), {"__module__": layer.__module__})


def readers_of_one_input(
    model: nnx.Module, layers: Mapping[str, Carrier], forward: Forward, batch: Any
) -> list[list[str]]:
    """Returns the names of the layers in groups that read one array, without computing anything.

    A layer that is not called is in none.

    Args:
        model: The model; its layers tell another listener afterwards.
        layers: Layers of it by name.
        forward: Runs the model.
        batch: What it runs on.
    """
    inputs: dict[str, list[Array]] = {}  # which keeps them, so that no two have one id
    listen_to(layers, lambda name, layer, x: inputs.setdefault(name, []).append(x))
    graph, state = nnx.split(model)

    def run(state, batch):
        forward(nnx.merge(graph, state), batch)

    jax.eval_shape(run, state, batch)
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in layers:
        if name in inputs:
            groups.setdefault(tuple(map(id, inputs[name])), []).append(name)
    return list(groups.values())
