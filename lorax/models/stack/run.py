"""The layers of a decoder, one after another, each with what the backward pass keeps of it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from lorax.layers.attention import Context
from lorax.models.stack.offload import run_in_order
from lorax.models.stack.recompute import (
    REPEATING,
    Recomputation,
    check_kept_layers,
    checkpointed,
)


def run_layers(
    layers: Sequence[nnx.Module],
    hidden: Float[Array, "b t d"],
    context: Context,
    recomputation: Recomputation,
    *,
    from_host: bool = False,
) -> Float[Array, "b t d"]:
    """Returns what the last of the layers, run one after another, returns.

    Args:
        layers: Each is called with (hidden, context), and returns its output and a cache.
        hidden: Input of the first one.
        context: What all of them read besides.
        recomputation: What the backward pass recomputes.
        from_host: Whether the program copies from the host's memory besides; see `run_in_order`.
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
    return _run_layer(layer, hidden, dataclasses.replace(context, repeated=True))
