"""Adapters into the weights, out of them again, and off the model."""

import jax
import jax.numpy as jnp
from flax import nnx

from lorax.adapters.lora import LoraLinear
from lorax.adapters.nnx.tree import lora_layers, module_references, set_child
from lorax.layers.linear import Frozen


def merge_lora[M: nnx.Module](model: M, *, keep_adapters: bool = False) -> M:
    """Returns `model` with every update added to its kernel: ``W + scale · A·B``.

    Sums in float32 and rounds once, as PEFT's `merge` does.

    Args:
        model: A model from `apply_lora`; it stays as it was.
        keep_adapters: Keep A and B beside the merged kernel, so that `unmerge_lora` can take the
            update out again; otherwise the layers become plain `nnx.Linear`.

    Raises:
        ValueError: If nothing is adapted, an update is not finite, or a layer is merged already.
    """
    merged = nnx.clone(model)
    references, layers = module_references(merged), lora_layers(merged)
    if not layers:
        raise ValueError("the model has no adapters to merge")
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name} is merged already")
        kernel = layer.merged_kernel()
        if not bool(jnp.isfinite(kernel).all()):
            raise ValueError(f"{name}: merging gives values that are not finite")
        if keep_adapters:
            layer.kernel, layer.merged = Frozen(kernel), True
            continue
        for parent, key in references[id(layer)]:
            set_child(parent, key, _plain_linear(layer, kernel))
    return merged


def unmerge_lora[M: nnx.Module](model: M) -> M:
    """Takes the updates out of ``merge_lora(model, keep_adapters=True)``: ``W' - scale · A·B``.

    Exact up to the rounding of `W'`, so in bfloat16 the result can differ from the original
    kernel by one unit in the last place of `W'`.

    Raises:
        ValueError: If no layer is merged.
    """
    unmerged = nnx.clone(model)
    layers = [layer for layer in lora_layers(unmerged).values() if layer.merged]
    if not layers:
        raise ValueError("no layer is merged: unmerge_lora undoes merge_lora(keep_adapters=True)")
    for layer in layers:
        kernel = layer.kernel[...]
        base = (kernel.astype(jnp.float32) - layer.update()).astype(kernel.dtype)
        layer.kernel, layer.merged = Frozen(base), False
    return unmerged


def unload_lora[M: nnx.Module](model: M) -> M:
    """Returns `model` without its adapters: every adapted layer is its frozen base again.

    Raises:
        ValueError: If a layer is merged: its base is not known any more.
    """
    unloaded = nnx.clone(model)
    references = module_references(unloaded)
    for name, layer in lora_layers(unloaded).items():
        if layer.merged:
            raise ValueError(f"{name} is merged; unmerge_lora first")
        for parent, key in references[id(layer)]:
            set_child(parent, key, _plain_linear(layer, layer.kernel[...]))
    return unloaded


def _plain_linear(layer: LoraLinear, kernel: jax.Array) -> nnx.Linear:
    linear = nnx.eval_shape(
        lambda: nnx.Linear(
            layer.in_features,
            layer.out_features,
            use_bias=layer.bias is not None,
            dtype=layer.dtype,
            param_dtype=kernel.dtype,
            preferred_element_type=layer.preferred_element_type,
            rngs=nnx.Rngs(0),
        )
    )
    linear.kernel = nnx.Param(kernel)
    if layer.bias is not None:
        linear.bias = nnx.Param(layer.bias.get_value())
    return linear
