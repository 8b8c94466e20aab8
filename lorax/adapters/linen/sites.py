"""Kinds of Linen layers that can carry an adapter, each with its linear map."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen
from flax.core import meta
from flax.linen.dtypes import canonicalize_dtype, promote_dtype
from jaxtyping import Array

from lorax.adapters.linen.update import BESIDE, Update
from lorax.layers.conv import convolution_map
from lorax.layers.embed import attended
from lorax.layers.general import einsum_map, general_map
from lorax.layers.maps import Convolution, Lookup, Map, Matmul, apply_map

type Shape = tuple[int, ...]
type Call = Callable[..., Array]
"""(site, layer, update, *arguments of the layer's method) → what the adapted layer gives."""


@dataclasses.dataclass(frozen=True)
class LinenSite:
    """A class of Linen's and its subclasses. To add one: an object like this, an entry in `SITES`.

    Attributes:
        layer: The class.
        calls: Its methods that multiply by the weight, each with what an adapted layer computes.
        map_of: Returns the linear map of (layer, shape of its weight, further arguments of its
            call), or why it has none.
        obstacle: Returns why a layer cannot carry an adapter, or None.
        weight: The name of the weight.
        by_name_only: Whether ``all-linear`` leaves such layers out.
    """

    layer: type[linen.Module]
    calls: Mapping[str, Call]
    map_of: Callable[..., Map | str]
    obstacle: Callable[[Any], str | None]
    weight: str = "kernel"
    by_name_only: bool = False

    def weight_of(self, module: linen.Module) -> Any:
        """Returns the layer's weight while it is applied, or None."""
        return meta.unbox(module.get_variable("params", self.weight))


def update_of(module: linen.Module) -> Any:
    """Returns what lies beside a layer's weight while it is applied: its `Update`, or None."""
    return module.get_variable("params", BESIDE)


def _apply(site: LinenSite, module: Any, update: Update, inputs: Array) -> Array:
    kernel = site.weight_of(module)
    bias = meta.unbox(module.get_variable("params", "bias")) if module.use_bias else None
    dtype = canonicalize_dtype(inputs, kernel, bias, dtype=module.dtype)
    linear_map = update.linear_map
    w = linear_map.matrix(kernel)
    y = apply_map(linear_map, inputs, w, update.operands(w), update.way, dtype)
    if bias is None:
        return y
    return y + bias.astype(y.dtype).reshape(_among_outputs(linear_map, y.ndim, bias.shape))


def _among_outputs(linear_map: Any, ndim: int, shape: Shape) -> Shape:
    """Returns the shape that a bias of the output's features has among the axes of the output."""
    places = getattr(linear_map, "places", None)
    if places is None:
        return (1,) * (ndim - len(shape)) + shape
    wanted = sorted(place % ndim for place in places)
    return tuple(shape[wanted.index(axis)] if axis in wanted else 1 for axis in range(ndim))


def _apply_einsum(
    site: LinenSite, module: Any, update: Update, inputs: Array, einsum_str: str | None = None
) -> Array:
    if _einsum_map(module, module.shape, einsum_str) != update.linear_map:
        name = ".".join(module.path)
        raise ValueError(f"{name} is called with another einsum than with apply_lora's inputs")
    return _apply(site, module, update, inputs)


def _look_up(site: LinenSite, module: Any, update: Update, inputs: Array) -> Array:
    if not jnp.issubdtype(inputs.dtype, jnp.integer):
        raise ValueError(f"inputs must be integers, got {inputs.dtype}")
    table = site.weight_of(module)
    dtype = canonicalize_dtype(table, dtype=module.dtype, inexact=False)
    operands = update.operands(table)
    return apply_map(update.linear_map, inputs, table, operands, update.way, dtype)


def _attend(site: LinenSite, module: Any, update: Update, query: Array) -> Array:
    table = site.weight_of(module)
    dtype = canonicalize_dtype(query, table, dtype=module.dtype)
    return attended(query, table, update.operands(table), update.way, dtype)


def _dense_map(module: linen.Dense, shape: Shape, *_: Any) -> Matmul:
    return Matmul((shape[0],), (shape[1],))


def _general_map(module: linen.DenseGeneral, shape: Shape, *_: Any) -> Matmul:
    axis = (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)
    return general_map(shape[: len(axis)], shape[len(axis) :], axis)


def _einsum_map(module: linen.Einsum, shape: Shape, einsum_str: str | None = None) -> Matmul | str:
    chosen = einsum_str or module.einsum_str
    assert chosen is not None
    return einsum_map(chosen, shape)


def _lookup_map(module: linen.Embed, shape: Shape, *_: Any) -> Lookup:
    return Lookup((shape[0], shape[1]))


def _convolution_map(module: linen.Conv, shape: Shape, *_: Any) -> Convolution:
    return convolution_map(module, module.features, shape[-2])


def _obstacle(module: Any) -> str | None:
    if getattr(module, "batch_dims", None):
        return "it has batch_dims: a matrix of its own for each index"
    own = [name for name in ("dot_general", "dot_general_cls") if getattr(module, name, None)]
    if own or module.promote_dtype is not promote_dtype:
        return f"it has a {(*own, 'promote_dtype')[0]} of its own"
    if module.precision is not None:
        return f"it sets precision={module.precision}; set jax_default_matmul_precision instead"
    if getattr(module, "preferred_element_type", None) is not None:
        return f"it sets preferred_element_type={module.preferred_element_type}"
    return None


def _embed_obstacle(module: linen.Embed) -> str | None:
    if module.promote_dtype is not promote_dtype:
        return "it has a promote_dtype of its own"
    if module.num_embeddings == 1:
        return "it has one row, which Flax gives whatever the index"
    return None


def _conv_obstacle(module: linen.Conv) -> str | None:
    if module.feature_group_count != 1:
        return f"it has feature_group_count={module.feature_group_count}: a matrix for each group"
    if module.mask is not None:
        return "it has a mask on its kernel"
    for name in ("conv_general_dilated", "conv_general_dilated_cls"):
        if getattr(module, name) is not None:
            return f"it has a {name} of its own"
    if module.promote_dtype is not promote_dtype:
        return "it has a promote_dtype of its own"
    return None


SITES: list[LinenSite] = [
    LinenSite(linen.Dense, {"__call__": _apply}, _dense_map, _obstacle),
    LinenSite(linen.DenseGeneral, {"__call__": _apply}, _general_map, _obstacle),
    LinenSite(linen.Einsum, {"__call__": _apply_einsum}, _einsum_map, _obstacle),
    LinenSite(
        linen.Embed,
        {"__call__": _look_up, "attend": _attend},
        _lookup_map,
        _embed_obstacle,
        weight="embedding",
        by_name_only=True,
    ),
    LinenSite(
        linen.Conv, {"__call__": _apply}, _convolution_map, _conv_obstacle, by_name_only=True
    ),
]


def site_of(module: linen.Module) -> LinenSite | None:
    """Returns the kind of a layer, or None for other modules."""
    return next((site for site in SITES if isinstance(module, site.layer)), None)


def site_called(context: linen.module.InterceptorContext) -> LinenSite | None:
    """Returns the kind of a layer whose own method of Linen's is called, or None.

    A subclass's method is not, but where it calls Linen's, that is.
    """
    site = site_of(context.module)
    if site is None or context.method_name not in site.calls:
        return None
    own = getattr(site.layer, context.method_name)
    called = getattr(context.orig_method, "func", None)
    return site if called is getattr(own, "__wrapped__", None) else None
