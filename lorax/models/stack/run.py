"""Runs the layers of a decoder one after another, each under its checkpointing policy."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from lorax.layers.attention import Context
from lorax.layers.carrier import Carrier
from lorax.models.stack.offload import run_in_order
from lorax.models.stack.recompute import (
    REPEATING,
    Recomputation,
    check_kept_layers,
    checkpointed,
)
from lorax_kernels.weights import Weight, computed_after, dense


def run_layers(
    layers: Sequence[nnx.Module],
    hidden: Float[Array, "b t d"],
    context: Context,
    recomputation: Recomputation,
    *,
    from_host: bool = False,
) -> Float[Array, "b t d"]:
    """Runs the layers one after another, and returns the output of the last.

    Args:
        layers: Each is called with (hidden, context), and returns its output and a cache.
        hidden: Input of the first one.
        context: Further input of all layers.
        recomputation: The recomputation of the backward pass.
        from_host: Whether the program also copies from the host's memory; see `run_in_order`.
    """
    policy = recomputation.policy
    kept = recomputation.kept_layers
    runs = [checkpointed(_run_layer, policy)] * len(layers)
    offloaded = 0
    if policy in REPEATING:
        repeated = len(layers) - check_kept_layers(kept, len(layers))
        runs = [checkpointed(_repeat_layer, policy)] * repeated
        runs += [checkpointed(_run_layer, "selective")] * kept
        # What the last layer keeps is wanted first: it would be back before it is gone.
        offloaded = min(repeated, len(layers) - 1) if policy == "offload" else 0
    if policy == "offload" or from_host:
        return run_in_order(runs, layers, hidden, context, offloaded=offloaded)
    for run, layer in zip(runs, layers, strict=True):
        hidden = run(layer, hidden, context)
    return hidden


def _run_layer(layer: Any, hidden: Float[Array, "b t d"], context: Context):
    return layer(hidden, context=context)[0]


def _repeat_layer(layer: Any, hidden: Float[Array, "b t d"], context: Context):
    hidden = _make_dense(layer, hidden)
    return _run_layer(layer, hidden, dataclasses.replace(context, repeated=True))


def _make_dense(layer: nnx.Module, hidden: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """Replaces the stored matrices of a layer by dense ones, computed once `hidden` is there.

    The backward pass of a recomputed layer then has one copy of each matrix, for the layer's second
    forward pass and for the gradient of its input.
    """
    modules = [module for _, module in nnx.iter_graph(layer) if isinstance(module, Carrier)]
    stored = [module for module in modules if isinstance(module.matrix, Weight)]
    matrices, hidden = computed_after([module.matrix for module in stored], hidden)
    for module, matrix in zip(stored, matrices, strict=True):
        module.freeze(dense(matrix))
    return hidden
