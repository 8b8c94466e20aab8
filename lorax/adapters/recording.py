"""What EVA knows of the inputs of a layer while batches run through a model."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lorax.adapters.eva import (
    Directions,
    converged,
    explained_variance_ratios,
    no_directions,
    update,
)
from lorax.layers.maps import Matmul

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


class Found(NamedTuple):
    """What is read of a `Recording` after a batch."""

    ratios: Float[Array, " c"]
    converged: Bool[Array, " c"]
    seen: Int[Array, ""]


def no_recording(components: int, k: int) -> Recording:
    """Returns the recording before the first row."""
    state = no_directions(components, k)
    ratios = explained_variance_ratios(state)
    return Recording(state, ratios, jnp.zeros(components, bool), jnp.ones((), bool))


def with_input(
    before: Recording, x: Array, mask: Array | None, name: str, linear_map: Matmul, tau: float
) -> Recording:
    """Returns the recording after one more input of a layer.

    Args:
        before: The recording.
        x: The input, of any shape that the layer takes.
        mask: Which rows of it count; None: all.
        name: The layer's.
        linear_map: Likewise.
        tau: The cosine at which a component has converged.

    Raises:
        ValueError: If the mask does not fit the input.
    """
    rows = linear_map.rows(x)
    mask = jnp.ones(rows.shape[:-1], bool) if mask is None else mask
    if mask.shape != rows.shape[:-1]:
        raise ValueError(
            f"{name}: the mask is {mask.shape}, and the layer's inputs are {rows.shape[:-1]} "
            f"rows of {rows.shape[-1]} features: give a mask of that shape, or leave the layer "
            "out with lora.exclude_modules"
        )
    return _after(before, rows.reshape(-1, rows.shape[-1]), mask.reshape(-1), tau)


@functools.partial(jax.jit, static_argnames="tau")
def _after(before: Recording, x: Array, mask: Array, tau: float) -> Recording:
    """Returns the recording after more rows; jitted, so that layers of one shape share a trace."""

    def more(before: Recording) -> Recording:
        old = before.directions
        new = update(old, x, mask)
        kept = jnp.where(new.seen > old.seen, converged(old, new, tau), before.converged)
        return Recording(new, explained_variance_ratios(new), kept, before.active)

    return jax.lax.cond(before.active, more, lambda before: before, before)


def read(recordings: Mapping[str, Recording], counted: Array, reason: str) -> dict[str, Found]:
    """Returns what is known of each layer after a batch.

    Args:
        recordings: By the name of the layer.
        counted: Whether any row of the batch counts.
        reason: Why inputs may be lost on the way, and what to do.

    Raises:
        ValueError: If the inputs of a layer do not arrive.
    """
    found = jax.device_get(
        {n: Found(v.ratios, v.converged, v.directions.seen) for n, v in recordings.items()}
    )
    for name, each in found.items():
        if counted and not each.seen:
            raise ValueError(f"the inputs of {name} do not arrive: {reason}")
    return found
