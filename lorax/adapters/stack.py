"""Adapters of layers that are stacked: axes before the last two of W, one index per layer."""

import functools
import math
from typing import Any

import jax
from jaxtyping import Array, Float, Key

from lorax.adapters import method
from lorax.adapters.method import Params, Spec, Start
from lorax.layers.maps import Map


def over_stack(function: Any, w: Any) -> Any:
    """Returns a function mapped over the axes of stacked layers: all but the last two of W."""
    for _ in w.shape[:-2]:
        function = jax.vmap(function)
    return function


def keys_of(key: Key[Array, ""], w: Any) -> Key[Array, "..."]:
    """Returns a key for each of the layers that are stacked in W; `key` if it is one layer."""
    return keys_for(key, w.shape[:-2])


def keys_for(key: Key[Array, ""], stack: tuple[int, ...]) -> Key[Array, "..."]:
    """Returns a key for each index of the axes of stacked layers; `key` if there are none."""
    return jax.random.split(key, math.prod(stack)).reshape(stack) if stack else key


def start(spec: Spec, w: Any, key: Key[Array, ""], kind: str) -> Start:
    """Returns what the adapters of the layers begin with; see `Method.start`."""
    return over_stack(functools.partial(_start, spec, kind), w)(keys_of(key, w), w)


def _start(spec: Spec, kind: str, key, w) -> Start:
    return spec.method.start(spec, w, key, kind)


def operands(spec: Spec, w: Any, values: Params) -> Any:
    """Returns `Method.operands` of every layer."""
    return over_stack(lambda w, values: spec.method.operands(spec, w, values), w)(w, values)


def merged(spec: Spec, linear_map: Map, w: Any, values: Params) -> Float[Array, "*stack k n"]:
    """Returns every layer's matrix with its adapter in it, float32."""
    merge = over_stack(lambda w, values: method.merged(spec, linear_map, w, values), w)
    return merge(w, values)
