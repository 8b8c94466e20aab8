"""Adapters into the weights, out of them again, and off the model."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lorax.adapters.initial import initialisation
from lorax.adapters.nnx.adapter import (
    begins_in_base,
    merge_factor,
    merged_bias,
    merged_matrix,
    rebase,
    split_start,
    unmerged_bias,
    unmerged_matrix,
)
from lorax.adapters.nnx.apply import targets_of
from lorax.adapters.nnx.tree import (
    adapted_layers,
    layers_with_adapters,
    named_modules,
    set_child,
)
from lorax.config.adapter import EVA, LoraConfig
from lorax.layers.carrier import Carrier, Frozen
from lorax.system.arguments import check_kind
from lorax_kernels import Matrix, Weight

_MODEL = "an nnx.Module from apply_lora"


def merge_lora[M: nnx.Module](model: M, *, keep_adapters: bool = False) -> M:
    """Returns `model` with every update added to its kernel: ``W + scale · A·B``.

    Sums in float32 and rounds once, as PEFT's `merge` does.

    Args:
        model: A model from `apply_lora`; it stays as it was.
        keep_adapters: Keep A and B with the merged kernel, so that `unmerge_lora` can take the
            update out again; otherwise the layers have none any more.

    Raises:
        ValueError: If nothing is adapted, an update is not finite, or a layer is merged already.
    """
    check_kind("model", model, nnx.Module, _MODEL)
    merged = nnx.clone(model)
    layers = adapted_layers(merged)
    if not layers:
        inactive = bool(layers_with_adapters(merged))
        raise ValueError(
            "no adapter is active: choose one with lorax.use_adapter(model, name)"
            if inactive
            else "the model has no adapters to merge"
        )
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name} is merged already; unmerge_lora the model first")
        matrix = merged_matrix(layer)
        try:
            bias = merged_bias(layer)
        except ValueError as error:
            raise ValueError(f"{name}: {error}; train it with lora_bias=False") from None
        if not bool(jnp.isfinite(matrix).all()):
            raise ValueError(f"{name}: merging gives values that are not finite")
        if keep_adapters:
            layer.adapter.merged_factor.set_value(merge_factor(layer))
            layer.freeze(matrix)
            _set_bias(layer, bias)
            layer.merged = True
        else:
            _set_bias(layer, bias)
            _unload(layer, matrix)
    if not keep_adapters:
        _thaw(merged)
    return merged


def unmerge_lora[M: nnx.Module](model: M) -> M:
    """Takes the updates out of ``merge_lora(model, keep_adapters=True)``: ``W' - scale · A·B``.

    Exact up to the rounding of `W'`, so in bfloat16 the result can differ from the original
    kernel by one unit in the last place of `W'`.

    Raises:
        ValueError: If no layer is merged.
    """
    check_kind("model", model, nnx.Module, _MODEL)
    unmerged = nnx.clone(model)
    layers = [layer for layer in adapted_layers(unmerged).values() if layer.merged]
    if not layers:
        raise ValueError("no layer is merged: unmerge_lora undoes merge_lora(keep_adapters=True)")
    for layer in layers:
        bias = unmerged_bias(layer)
        layer.freeze(unmerged_matrix(layer))
        _set_bias(layer, bias)
        layer.adapter.merged_factor.set_value(None)
        layer.merged = False
    return unmerged


def rebase_lora[M: nnx.Module](model: M) -> M:
    """Returns `model` with what its adapters began with taken out of the base.

    PiSSA and OLoRA begin with a part of W, which lorax subtracts as ``s·A₀·B₀``. Here the base is
    ``W' = W - s·A₀·B₀``, rounded once to its dtype, with plain adapters of rank r, as PEFT trains
    them. Save both: ``save_model(unload_lora(rebased), …)`` and ``save_adapter(rebased, …)``.
    Without it, `save_adapter` writes adapters of rank 2r for the original base.

    Raises:
        ValueError: If no adapter began so, or a layer is merged.
    """
    check_kind("model", model, nnx.Module, _MODEL)
    rebased = nnx.clone(model)
    layers = [layer for layer in adapted_layers(rebased).values() if begins_in_base(layer)]
    if not layers:
        raise ValueError(
            "no adapter began with a part of the base: save_adapter writes them for the base as it "
            "is"
        )
    if any(layer.merged for layer in layers):
        raise ValueError("the adapters are merged; unmerge_lora the model first")
    for layer in layers:
        rebase(layer)
    return rebased


def with_starts[M: nnx.Module](model: M, settings: LoraConfig) -> M:
    """Returns a loaded model whose adapters know what they began with, as before they were saved.

    PiSSA and OLoRA are saved as plain LoRA of rank 2r, ``[A, A₀]`` and ``[B; -B₀]``; here these are
    A, B, A₀ and B₀ again.

    Args:
        model: A model from `load_adapter`.
        settings: With which the adapters were made. Where they begin with no part of the base, and
            where a layer has another rank than twice its own, nothing changes.
    """
    start = settings.init_lora_weights
    if start is True or start == EVA or not initialisation(start).changes_base:
        return model
    begun = nnx.clone(model)
    ranks = {target.name: target.r for target in targets_of(unload_lora(model), settings)}
    for name, layer in adapted_layers(begun).items():
        r = ranks.get(name)
        is_plain = layer.linear_map.kind != "lookup" and not begins_in_base(layer)
        if r is not None and is_plain and layer.adapter.spec.r == 2 * r:
            split_start(layer, r, str(start))
    return begun


def unload_lora[M: nnx.Module](model: M) -> M:
    """Returns `model` without its adapters: every adapted layer is its base again.

    Biases and modules that were trained whole stay as they are.

    Raises:
        ValueError: If a layer is merged: its base is not known any more.
    """
    check_kind("model", model, nnx.Module, _MODEL)
    unloaded = nnx.clone(model)
    for name, layer in layers_with_adapters(unloaded).items():
        if layer.merged:
            raise ValueError(f"{name} is merged; unmerge_lora first")
        _unload(layer, layer.matrix)
    _thaw(unloaded)
    return unloaded


def _thaw(model: nnx.Module) -> None:
    """Makes what `apply_lora` froze `nnx.Param` again: arrays of the device's."""
    thawed: dict[int, nnx.Param] = {}
    for module in (model, *named_modules(model).values()):
        for name, variable in list(vars(module).items()):
            if isinstance(variable, Frozen) and isinstance(variable.get_value(), jax.Array):
                shared = thawed.setdefault(id(variable), nnx.Param(variable.get_value()))
                set_child(module, name, shared)


def _set_bias(layer: Carrier, bias: Any) -> None:
    """Gives a layer's bias a value; it stays what trains or what does not."""
    if layer.bias is not None:
        layer.bias.set_value(bias)


def _unload(layer: Carrier, matrix: Matrix) -> None:
    """Takes all adapters off a layer, whose kernel and bias may train then."""
    layer.attached.clear()
    layer.active = None
    if isinstance(matrix, Weight):
        layer.freeze(matrix)
    else:
        setattr(layer, layer.weight_name, nnx.Param(layer.linear_map.kernel(matrix)))
    if layer.bias is not None:
        layer.bias = nnx.Param(layer.bias.get_value())
