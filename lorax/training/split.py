"""A model taken apart, as a training step needs it, whichever module library made it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from lorax.adapters.nnx.apply import set_dropout_key
from lorax.adapters.nnx.tree import adapted_layers, layers_with_adapters, split_trainable
from lorax.devices.specs import Parts, parts_of
from lorax.models.noise import EmbeddingNoise
from lorax.training.arguments import refuse_untrainable


@dataclasses.dataclass(frozen=True)
class Split:
    """A model taken apart.

    Attributes:
        trainable: What trains: a pytree of arrays.
        frozen: The rest: another.
        rebuild: ``(trainable, frozen, key)`` → the model that the loss is given, in which the key
            decides every mask.
        parts: The partitions of its parameters.
    """

    trainable: Any
    frozen: Any
    rebuild: Callable[[Any, Any, jax.Array], Any]
    parts: Parts


def split_model(model: nnx.Module) -> Split:
    """Returns the parts of an NNX model, of which `nnx.Param` trains.

    Raises:
        ValueError: If nothing trains, an adapter is merged, or a batch norm would update its
            statistics.
    """
    refuse_untrainable(model)
    graph, trainable, frozen = split_trainable(model)
    if not jax.tree.leaves(trainable):
        raise ValueError(f"nothing would train: {_why_untrained(model)}")

    def rebuild(trainable, frozen, key):
        merged = nnx.merge(graph, trainable, frozen, copy=True)
        set_dropout_key(merged, key)
        _reseed(merged, key)
        return merged

    return Split(trainable, frozen, rebuild, parts_of(model))


def _why_untrained(model: nnx.Module) -> str:
    if layers_with_adapters(model) and not adapted_layers(model):
        return "no adapter is active. Choose one with lorax.use_adapter(model, name)"
    return "the model has no nnx.Param. apply_lora it first"


def _reseed(model: nnx.Module, key: jax.Array) -> None:
    """Gives `nnx.Dropout` and its like a new key too, and noise on embeddings."""
    nodes = [node for _, node in nnx.iter_graph(model)]
    streams = [node for node in nodes if isinstance(node, nnx.RngStream)]
    noises = [node for node in nodes if isinstance(node, EmbeddingNoise)]
    for index, stream in enumerate(streams):
        stream.key.set_value(jax.random.fold_in(key, 1_000_000 + index))
    for index, noise in enumerate(noises):
        noise.set_key(jax.random.fold_in(key, 2_000_000 + index))
