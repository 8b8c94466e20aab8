"""Adapters of Linen models in PEFT's format, by the dotted paths of their modules."""

import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen
from flax.core import meta

from lorax.adapters.linen.apply import apply_saved
from lorax.adapters.linen.merge import ADAPTED
from lorax.adapters.linen.model import FIXED, TRAINED, AdaptedModel
from lorax.adapters.linen.trace import Inputs
from lorax.adapters.linen.tree import Path as Place
from lorax.adapters.linen.tree import dotted, replaced
from lorax.adapters.targets import TargetError
from lorax.interop.peft_config import read_adapter_config
from lorax.interop.peft_files import (
    AdapterFormat,
    bias_setting,
    check_copies,
    check_finite,
    compare_shapes,
    config_fields,
    copies_of_biases,
    layer_tensors,
    refuse_unportable,
    saved_modules,
    short_targets,
    tensor_file,
    write_adapter,
)
from lorax.interop.peft_layout import (
    PREFIX,
    file_key,
    file_shape,
    from_file,
    kernel_from_file,
    kernel_to_file,
)
from lorax.interop.safetensors import read_headers, read_tensor
from lorax.system.arguments import check_kind

# Last part of a parameter's path: that of its key in a file, and whether it is transposed there.
_NAMES = {"kernel": ("weight", True), "embedding": ("weight", False), "scale": ("weight", False)}


def save_adapter(
    adapted: AdaptedModel,
    variables: Mapping[str, Any],
    directory: str | Path,
    *,
    format: AdapterFormat = "peft",
    base_model_name_or_path: str | None = None,
    revision: str | None = None,
    card: str | None = None,
) -> Path:
    """Writes the adapters in PEFT's format, whole or not at all; see `lorax.save_adapter`.

    Args:
        adapted: From `apply_lora`.
        variables: Its variables.
        directory: A folder that does not exist yet, or is empty.
        format: ``peft`` keeps ranks and scales as they are; ``peft-portable`` gives every pair one
            rank and folds the scale into B.
        base_model_name_or_path: Recorded in the folder: where the base is.
        revision: Branch, tag or commit of it on the hub, recorded too.
        card: Text of the README.md in the folder.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If `directory` holds something, a value is not finite, the format cannot
            hold what was trained, or the variables are not those of the model.
    """
    check_kind("adapted", adapted, AdaptedModel, ADAPTED)
    check_kind("variables", variables, Mapping, "the variables that apply_lora returns")
    check_kind("directory", directory, (str, os.PathLike), "the path of a folder")
    unsaved = sorted(set(variables) - {"params", TRAINED, FIXED})
    if unsaved:
        warnings.warn(
            f"{', '.join(unsaved)} of the variables are not saved with the adapter, and "
            "load_adapter takes those that it is given. If training changed them, save these "
            "collections too, and give load_adapter the variables with them",
            stacklevel=2,
        )
    portable = format == "peft-portable"
    tensors = _tensors(adapted, variables, portable)
    tokens = {layer.name: list(layer.spec.tokens) for layer in adapted.layers if layer.spec.tokens}
    specs = {
        layer.name: layer.spec.method.plain(layer.spec, layer.values(variables))[0]
        for layer in adapted.layers
        if not layer.spec.tokens
    }
    trained = [(dotted(path[:-1]), path[-1]) for path, _ in adapted.trained_base(variables)]
    linear = [name for name, can_carry in adapted.modules.items() if can_carry]
    others = adapted.modules.keys() - set(linear)
    kind = type(adapted.model)
    config = {
        **config_fields(specs, portable=portable),
        "task_type": None,
        "auto_mapping": {"base_model_class": kind.__name__, "parent_library": kind.__module__},
        "base_model_name_or_path": base_model_name_or_path,
        "revision": revision,
        "target_modules": short_targets(list(specs), linear, others),
        "bias": bias_setting(trained, specs.keys()),
        "modules_to_save": saved_modules(trained) or None,
        **({"trainable_token_indices": tokens} if tokens else {}),
    }
    return write_adapter(directory, tensors, config, card)


def load_adapter(
    model: linen.Module,
    variables: Mapping[str, Any],
    directory: str | Path,
    *args: Any,
    method: Any = None,
    **kwargs: Any,
) -> tuple[AdaptedModel, dict[str, Any]]:
    """Returns a model with the adapters of a PEFT folder, and its variables with theirs.

    Tensors of any float type are read as float32. The file must hold exactly the tensors that its
    config asks for on this model.

    Args:
        model: As of `apply_lora`.
        variables: With the base weights that the adapter was trained on.
        directory: The adapter's folder.
        args: Example inputs, as of `apply_lora`.
        method: Likewise.
        kwargs: Likewise.

    Raises:
        TypeError: If an argument is of another kind.
        AdapterError: Naming the file and the tensor or field.
        TargetError: If the config names modules that the model does not have.
    """
    check_kind("directory", directory, (str, os.PathLike), "the path of an adapter's folder")
    directory = Path(directory)
    config = read_adapter_config(directory)
    try:
        adapted, variables = apply_saved(model, variables, config, Inputs(args, kwargs, method))
    except TargetError as error:
        raise TargetError(f"{directory} does not fit this model: {error}") from None
    path = tensor_file(directory)
    entries = read_headers([path])
    expected = _expected_shapes(adapted, variables)
    copies = {key: expected[own] for key, own in copies_of_biases(entries, expected).items()}
    compare_shapes(path, entries, expected, copies)
    found = {key: read_tensor(entry) for key, entry in entries.items()}
    check_finite(path, found)
    check_copies(path, found, expected)
    return adapted, {**variables, TRAINED: _filled(adapted, variables, found)}


def _tensors(adapted: AdaptedModel, variables: Any, portable: bool) -> dict[str, np.ndarray]:
    rank = None
    if portable:
        kinds = [(layer.spec, layer.linear_map.kind) for layer in adapted.layers]
        rank = max(spec.method.rank(spec, kind) for spec, kind in kinds)
    tensors: dict[str, np.ndarray] = {}
    for layer in adapted.layers:
        values = layer.values(variables)
        tensors |= layer_tensors(layer.name, layer.linear_map, layer.spec, values, rank=rank)
    extra = {}
    for key, transposed, _, value in _trained_base(adapted, variables):
        whole = np.asarray(value)
        extra[key] = np.ascontiguousarray(kernel_to_file(whole) if transposed else whole)
    if portable:
        refuse_unportable(extra)
    return tensors | extra


def _expected_shapes(adapted: AdaptedModel, variables: Any) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for layer in adapted.layers:
        linear_map = layer.linear_map
        for name, about in layer.spec.method.parameters.items():
            key = f"{PREFIX}{layer.name}.{file_key(linear_map, about)}"
            shapes[key] = file_shape(linear_map, about, name, layer.spec, layer.stack)
    for key, transposed, _, value in _trained_base(adapted, variables):
        shapes[key] = (*value.shape[:-3:-1], *value.shape[:-2]) if transposed else value.shape
    return shapes


def _filled(adapted: AdaptedModel, variables: Any, found: Mapping[str, np.ndarray]) -> Any:
    """Returns the collection ``lora`` with the values of a file."""
    trained = variables[TRAINED]
    for layer in adapted.layers:
        for name, about in layer.spec.method.parameters.items():
            key = f"{PREFIX}{layer.name}.{file_key(layer.linear_map, about)}"
            value = from_file(layer.linear_map, about, found[key].astype(np.float32))
            trained = replaced(trained, (*layer.path, name), jnp.asarray(value))
    for key, transposed, path, value in _trained_base(adapted, variables):
        stored = found[key].astype(np.float32)
        whole = jnp.asarray(kernel_from_file(stored) if transposed else stored, value.dtype)
        trained = replaced(trained, path, whole)
    return trained


def _trained_base(adapted: AdaptedModel, variables: Any) -> Iterator[tuple[str, bool, Place, Any]]:
    """Yields (key, whether transposed in the file, path, value) of base parameters that train."""
    carry = {layer.path for layer in adapted.layers}
    keys: set[str] = set()
    for path, value in adapted.trained_base(variables):
        inside = (*path[:-1], "base_layer") if path[:-1] in carry else path[:-1]
        name, transposed = _NAMES.get(path[-1], (path[-1], False))
        key = f"{PREFIX}{dotted((*inside, name))}"
        if key in keys:
            raise ValueError(f"two parameters of {dotted(path[:-1])} would have the name {name}")
        keys.add(key)
        whole = meta.unbox(value)
        yield key, transposed and whole.ndim > 1, path, whole
