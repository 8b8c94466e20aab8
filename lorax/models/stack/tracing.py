"""Tracing layers of one structure only once: a start takes seconds less."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer


class _LayerChangedError(Exception):
    """A layer changed one of its variables, or got a new one."""


def traced_once[T](run: Callable[..., T]) -> Callable[..., T]:
    """Returns ``run(layer, *arrays)``, traced once for all layers of one structure.

    A layer that changes its variables (`nnx.Dropout`'s count, sown values) runs as it is, because a
    traced function would lose the change. So does one with an attribute that cannot be hashed, and
    one outside a larger traced function, where each call would compile.

    Args:
        run: A function of a module and trees of arrays.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def traced(graph, state, *arrays):
        before = jax.tree.leaves(state)  # now, for the layer's variables will be the state's own
        layer = nnx.merge(graph, state)
        result = run(layer, *arrays)
        graph_after, state_after = nnx.split(layer)
        after = jax.tree.leaves(state_after)
        if graph_after != graph or any(a is not b for a, b in zip(before, after, strict=True)):
            raise _LayerChangedError
        return result

    def apply(layer: nnx.Module, *arrays: Any) -> T:
        graph, state = nnx.split(layer)
        if not (_is_traced() and _is_hashable(graph)):
            return run(layer, *arrays)
        try:
            return traced(graph, state, *arrays)
        except _LayerChangedError:
            return run(layer, *arrays)

    return apply


def _is_traced() -> bool:
    """Says whether operations become part of a program here, instead of being run."""
    return isinstance(jnp.zeros(()), Tracer)


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
