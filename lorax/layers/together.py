"""Layers that read one input, called in one operation where one of them knows how."""

from typing import Any

import jax
from jaxtyping import Array, Float


def apply_together(layers: tuple[Any, ...], x: Float[Array, "b t d"]) -> list[Array]:
    """Calls layers that read one input, in one operation where one of them knows how."""
    for layer in layers:
        if hasattr(layer, "apply_together"):
            return layer.apply_together(layers, x)
    return [layer(x) for layer in layers]


def apply_added(layer: Any, x: Array, residual: Array) -> Array:
    """Returns ``residual + layer(x)``, in one operation where the layer knows how."""
    if hasattr(layer, "apply_added"):
        return layer.apply_added(x, residual)
    return residual + layer(x)


def apply_mlp(
    gate: Any, up: Any, down: Any, x: Float[Array, "b t d"], residual: Array, repeated: bool
) -> Float[Array, "b t d"]:
    """Returns ``residual + down(silu(gate(x)) · up(x))``, in one operation where a layer knows how.

    `repeated` says whether the backward pass makes all of it again.
    """
    for layer in (gate, up, down):
        if hasattr(layer, "apply_mlp"):
            found = layer.apply_mlp(gate, up, down, x, residual, repeated)
            if found is not None:
                return found
    gated, upped = apply_together((gate, up), x)
    return residual + down(jax.nn.silu(gated) * upped)
