"""Weights of the base in PEFT's files: what trains beside the adapters, and copies."""

from collections.abc import Iterator

import numpy as np
from flax import nnx

from lorax.adapters.nnx.tree import adapted_layers, named_modules, tied_modules
from lorax.interop.peft_layout import PREFIX
from lorax.interop.peft_tied import tied_layers
from lorax.interop.tensors import hf_name
from lorax.layers.carrier import Carrier
from lorax_kernels import dense


def trained_base_tensors(model: nnx.Module) -> dict[str, np.ndarray]:
    """Returns the trained base tensors (biases, `modules_to_save`) under PEFT's names."""
    tensors = {}
    for key, transposed, variable in trained_parameters(model):
        value = np.asarray(variable.get_value())
        tensors[PREFIX + key] = np.ascontiguousarray(to_torch(value) if transposed else value)
    for name, source in tied_modules(model).items():
        shared = tensors.get(f"{PREFIX}{source}.weight")
        if shared is not None:
            tensors[f"{PREFIX}{name}.weight"] = shared.copy()
    return tensors


def to_torch(kernel: np.ndarray) -> np.ndarray:
    """Returns a kernel, (*window, k, n), as torch has it: (n, k, *window)."""
    return np.moveaxis(kernel, (-1, -2), (0, 1))


def from_torch(weight: np.ndarray) -> np.ndarray:
    """Returns the kernel of what `to_torch` returned."""
    return np.moveaxis(weight, (0, 1), (-1, -2))


def trains_base_weights(model: nnx.Module) -> bool:
    """Says whether base weights train: biases or `modules_to_save`."""
    return any(True for _ in trained_variables(model))


def trained_variables(model: nnx.Module) -> Iterator[tuple[str, str, nnx.Param]]:
    """Yields (module name, attribute, variable) of all that trains, except A and B."""
    for name, module in named_modules(model).items():
        for attribute, value in vars(module).items():
            if isinstance(value, nnx.Param) and not isinstance(value, nnx.LoRAParam):
                yield name, attribute, value


def trained_parameters(model: nnx.Module) -> Iterator[tuple[str, bool, nnx.Param]]:
    """Yields (PEFT's key without prefix, whether transposed there, variable)."""
    adapted = adapted_layers(model)
    for name, attribute, variable in trained_variables(model):
        inner = (*name.split("."), "base_layer") if name in adapted else tuple(name.split("."))
        yield *hf_name((*inner, attribute)), variable


def saved_modules(model: nnx.Module) -> list[str]:
    """Returns the modules trained in full, by their full names."""
    return sorted({n for n, attribute, _ in trained_variables(model) if attribute != "bias"})


def bias_setting(model: nnx.Module, layers: dict[str, Carrier]) -> str:
    """Returns PEFT's `bias` for the biases that train."""
    saved = set(saved_modules(model))
    biases = {n for n, a, _ in trained_variables(model) if a == "bias" and n not in saved}
    if not biases:
        return "none"
    return "lora_only" if biases <= layers.keys() else "all"


def base_copies(model: nnx.Module) -> dict[str, Carrier]:
    """Returns the layers whose base weight PEFT may save, by its key: embedding and head."""
    layers = adapted_layers(model) | tied_layers(model)
    return {f"{PREFIX}{name}.base_layer.weight": layer for name, layer in layers.items()}


def base_weight(layer: Carrier) -> np.ndarray:
    """Returns the weight of an adapted layer as PEFT saves it."""
    matrix = np.asarray(dense(layer.matrix))
    return matrix if layer.linear_map.kind == "lookup" else matrix.T


def base_shape(layer: Carrier) -> tuple[int, ...]:
    """Returns the shape of `base_weight`."""
    shape = tuple(layer.linear_map.shape)
    return shape if layer.linear_map.kind == "lookup" else shape[::-1]
