"""Adapters into the weights of a Linen model."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lorax.adapters import stack
from lorax.adapters.linen.model import FIXED, TRAINED, AdaptedModel, Layer
from lorax.adapters.linen.tree import dotted, get, replaced, value_at
from lorax.layers.maps import bias_of
from lorax.system.arguments import check_kind

ADAPTED = "the AdaptedModel that lorax.linen.apply_lora returns"


def merge_lora(adapted: AdaptedModel, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns variables with which the plain model computes what the adapted one does.

    Every update is added to its kernel, ``W + scale · A·B``: summed in float32 and rounded once to
    the dtype of the kernel, as PEFT's `merge` does. What trained of the model's own parameters
    is rounded to their dtypes.

    Args:
        adapted: From `apply_lora`.
        variables: Its variables; they stay as they were.

    Raises:
        TypeError: If one of them is something else.
        ValueError: If an update is not finite, or a `lora_bias` has no bias to be added to.
    """
    check_kind("adapted", adapted, AdaptedModel, ADAPTED)
    base = dict(variables["params"])
    params = adapted.base_params(variables)
    for layer in adapted.layers:
        params = _merge(layer, params, variables)
    for path, _ in adapted.trained_base(variables):
        value = value_at(params, path).astype(value_at(base, path).dtype)
        params = replaced(params, path, value)
    rest = {name: value for name, value in variables.items() if name not in (TRAINED, FIXED)}
    return {**rest, "params": params}


def _merge(layer: Layer, params: Any, variables: Mapping[str, Any]) -> Any:
    """Returns the parameters with one layer's adapter in them."""
    linear_map = layer.linear_map
    where = (*layer.path, layer.weight)
    w = linear_map.matrix(value_at(params, where))
    values = layer.values(variables)
    whole = stack.merged(layer.spec, linear_map, w, values).astype(w.dtype)
    if not bool(jnp.isfinite(whole).all()):
        raise ValueError(f"{layer.name}: merging gives values that are not finite")
    params = replaced(params, where, linear_map.kernel(whole))
    own = getattr(stack.operands(layer.spec, w, values), "bias", None)
    if own is None:
        return params
    beside = (*layer.path, "bias")
    if get(params, beside) is None:
        raise ValueError(
            f"{dotted(layer.path)}: its lora_bias cannot be merged, because the layer has no bias; "
            "train it with lora_bias=False"
        )
    bias = value_at(params, beside)
    total = bias.astype(own.dtype) + bias_of(linear_map, own)
    return replaced(params, beside, total.astype(bias.dtype))
