"""Reading and writing adapters in PEFT's format: adapter_config.json, adapter_model.safetensors."""

import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorax.adapters.method import Spec
from lorax.adapters.nnx.adapter import rank_of
from lorax.adapters.nnx.apply import apply_saved
from lorax.adapters.nnx.tree import (
    adapted_layers,
    layers_with_adapters,
    named_modules,
    tied_modules,
)
from lorax.adapters.sites import shape_of
from lorax.adapters.targets import TargetError
from lorax.interop.peft_config import AdapterError
from lorax.interop.peft_files import (
    TENSOR_FILE,
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
from lorax.interop.peft_tied import refuse_untied, settings_for, tied_keys, tied_layers, with_tied
from lorax.interop.safetensors import TensorEntry, read_headers, read_tensor
from lorax.interop.tensors import hf_name
from lorax.layers.carrier import Carrier
from lorax.models.decoder import CausalLM
from lorax.system.arguments import check_kind
from lorax_kernels import dense


def adapter_config(
    model: nnx.Module,
    *,
    base_model_name_or_path: str | None = None,
    revision: str | None = None,
    portable: bool = False,
) -> dict[str, Any]:
    """Returns the adapter_config.json that makes PEFT rebuild exactly the adapters of `model`.

    All values come from the adapted layers. Where ranks or alphas differ, the patterns name each
    module in full, because PEFT sorts patterns on saving and takes the first that matches.

    Args:
        model: A model from `apply_lora` or `load_adapter`.
        base_model_name_or_path: The base model's folder or hub id.
        revision: Branch, tag or commit of it on the hub.
        portable: One rank, ``lora_alpha = r``, for engines that read only ``alpha / r``.
    """
    tables = _tables(model)
    layers = {n: layer for n, layer in _adapted(model).items() if n not in tables}
    # PEFT reads the patterns for a tied head too.
    tied = {n: layer for n, layer in tied_layers(model).items() if layer in layers.values()}
    specs = {n: _as_saved(layer) for n, layer in (layers | tied).items()}
    trained = _trained(model)
    saved = saved_modules(trained)
    config = {
        **config_fields(specs, portable=portable),
        "task_type": "CAUSAL_LM" if isinstance(model, CausalLM) else None,
        "base_model_name_or_path": base_model_name_or_path,
        "revision": revision,
        "target_modules": _short_targets(model, list(layers)),
        "bias": bias_setting(trained, layers.keys()),
        "modules_to_save": saved or None,
    }
    if tables:
        config["trainable_token_indices"] = {n: list(ids) for n, ids in tables.items()}
    if any(source in saved or source in layers for source in tied_modules(model).values()):
        config["ensure_weight_tying"] = True
    return config


def _tables(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Returns the tokens that train by the name of their table."""
    specs = {name: layer.adapter.spec for name, layer in adapted_layers(model).items()}
    return {name: spec.tokens for name, spec in specs.items() if spec.tokens}


def _as_saved(layer: Carrier) -> Spec:
    """Returns a layer's adapter as one on the original base; see `Method.plain`."""
    spec = layer.adapter.spec
    return spec.method.plain(spec, layer.adapter.values)[0]


def adapter_tensors(model: nnx.Module, *, portable: bool = False) -> dict[str, np.ndarray]:
    """Returns the tensors of adapter_model.safetensors: A as (r, in), B as (out, r), float32.

    With `portable`, every pair is zero-padded to the largest rank and its scale folded into B.
    """
    layers = _adapted(model)
    rank = max(rank_of(layer) for layer in layers.values()) if portable else None
    tensors = {}
    for name, layer in layers.items():
        adapter = layer.adapter
        tensors |= layer_tensors(name, layer.linear_map, adapter.spec, adapter.values, rank=rank)
    tensors = with_tied(tensors, model)
    extra = trained_base_tensors(model)
    if portable:
        refuse_unportable(extra)
    return tensors | extra


def trained_base_tensors(model: nnx.Module) -> dict[str, np.ndarray]:
    """Returns the trained base tensors (biases, `modules_to_save`) under PEFT's names."""
    tensors = {}
    for key, transposed, variable in _trained_parameters(model):
        value = np.asarray(variable.get_value())
        tensors[PREFIX + key] = np.ascontiguousarray(kernel_to_file(value) if transposed else value)
    for name, source in tied_modules(model).items():
        shared = tensors.get(f"{PREFIX}{source}.weight")
        if shared is not None:
            tensors[f"{PREFIX}{name}.weight"] = shared.copy()
    return tensors


def trains_base_weights(model: nnx.Module) -> bool:
    """Says whether base weights train: biases or `modules_to_save`."""
    return any(True for _ in _trained_variables(model))


def save_adapter(
    model: nnx.Module,
    directory: str | Path,
    *,
    format: AdapterFormat = "peft",
    base_model_name_or_path: str | None = None,
    revision: str | None = None,
    card: str | None = None,
    files: Mapping[str, str | Path] | None = None,
) -> Path:
    """Writes the adapters of `model` in PEFT's format, whole or not at all.

    Args:
        model: A model from `apply_lora` or `load_adapter`.
        directory: A folder that does not exist yet, or is empty.
        format: ``peft`` keeps ranks and scales as they are; ``peft-portable`` gives every pair one
            rank and folds the scale into B.
        base_model_name_or_path: Recorded for PEFT, which loads the base from there.
        revision: Branch, tag or commit of it on the hub, recorded too.
        card: Text of the README.md in the folder.
        files: Further texts by the name of their file; a path is copied.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If `directory` holds something, a value is not finite, or the format cannot
            hold what was trained.
    """
    check_kind("model", model, nnx.Module, "an nnx.Module with adapters")
    check_kind("directory", directory, (str, os.PathLike), "the path of a folder")
    _tell_of_statistics(model)
    portable = format == "peft-portable"
    tensors = adapter_tensors(model, portable=portable)
    config = adapter_config(
        model,
        base_model_name_or_path=base_model_name_or_path,
        revision=revision,
        portable=portable,
    )
    return write_adapter(directory, tensors, config, card, files)


def _tell_of_statistics(model: nnx.Module) -> None:
    """Warns of batch statistics, which training may have changed and no adapter's file holds."""
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.BatchStat))]
    names = dict.fromkeys(".".join(map(str, path[:-1])) or "the model" for path in paths)
    if names:
        warnings.warn(
            f"{', '.join(names)}: batch statistics are not saved with the adapter, and "
            "load_adapter leaves those of the base. If training changed them, save "
            "nnx.state(model, nnx.BatchStat) too, and nnx.update the loaded model with it",
            stacklevel=3,
        )


def load_adapter[M: nnx.Module](model: M, directory: str | Path) -> M:
    """Returns `model` with the adapters of a PEFT folder, ready to train on or to evaluate.

    Tensors of any float type are read as float32. The file must hold exactly the tensors that its
    config asks for on this model; PEFT itself ignores missing and surplus tensors.

    Raises:
        TypeError: If an argument is of another kind.
        AdapterError: Naming the file and the tensor or field.
        TargetError: If the config names modules that the model does not have.
    """
    check_kind("model", model, nnx.Module, "an nnx.Module with the base weights")
    check_kind("directory", directory, (str, os.PathLike), "the path of an adapter's folder")
    if layers_with_adapters(model):
        raise AdapterError(
            f"{directory}: the model carries adapters already: load into a fresh base, or "
            "unload_lora the model first (merge_lora would leave them in its weights)"
        )
    directory = Path(directory)
    try:
        config = settings_for(model, directory)
        adapted = apply_saved(model, config)
    except TargetError as error:
        raise TargetError(f"{directory} does not fit this model: {error}") from None
    entries = check_adapter(adapted, directory)
    found = {key: read_tensor(entry) for key, entry in entries.items()}
    _check_values(found, adapted, directory / TENSOR_FILE)
    _fill(adapted, found)
    return adapted


def check_adapter(model: nnx.Module, directory: str | Path) -> dict[str, TensorEntry]:
    """Compares the tensors of a PEFT folder with an adapted model, which may be of shapes.

    Returns:
        The place of each tensor; only a head and an embedding that must be equal are read.

    Raises:
        AdapterError: Naming the file and the tensor: absent, unknown or of another shape.
    """
    path = tensor_file(Path(directory))
    entries = read_headers([path])
    expected = _expected_shapes(model)
    refuse_untied(entries, model, path)
    copies = {key: _base_shape(layer) for key, layer in _base_copies(model).items()}
    copies |= {key: expected[own] for key, own in copies_of_biases(entries, expected).items()}
    compare_shapes(path, entries, expected, copies)
    return entries


def _expected_shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor that adapter_model.safetensors must hold."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in _adapted(model).items():
        spec = layer.adapter.spec
        linear_map = layer.linear_map
        stack = tuple(layer.matrix.shape[:-2])
        for parameter, about in spec.method.parameters.items():
            key = f"{PREFIX}{name}.{file_key(linear_map, about)}"
            shapes[key] = file_shape(linear_map, about, parameter, spec, stack)
    shapes |= {key: shapes[of][::-1] for key, of in tied_keys(model).items()}
    for key, transposed, variable in _trained_parameters(model):
        shape = tuple(variable.get_value().shape)
        shapes[PREFIX + key] = (*shape[:-3:-1], *shape[:-2]) if transposed else shape
    for name, source in tied_modules(model).items():
        if (shared := f"{PREFIX}{source}.weight") in shapes:
            shapes[f"{PREFIX}{name}.weight"] = shapes[shared]
    return shapes


def _fill(model: nnx.Module, tensors: dict[str, np.ndarray]) -> None:
    def wide(key):
        return tensors[key].astype(np.float32)

    for name, layer in adapted_layers(model).items():
        linear_map = layer.linear_map
        for parameter, about in layer.adapter.spec.method.parameters.items():
            stored = wide(f"{PREFIX}{name}.{file_key(linear_map, about)}")
            value = jnp.asarray(from_file(linear_map, about, stored))
            layer.adapter.variable(parameter).set_value(value)
    for key, transposed, variable in _trained_parameters(model):
        value = wide(PREFIX + key)
        dtype = variable.get_value().dtype
        variable.set_value(jnp.asarray(kernel_from_file(value) if transposed else value, dtype))


def _check_values(found: dict[str, np.ndarray], model: nnx.Module, path: Path) -> None:
    """Refuses values that are not finite, and copies of another base's weights."""
    check_finite(path, found)
    expected = _expected_shapes(model)
    check_copies(path, found, expected)
    for key, layer in _base_copies(model).items():
        if key in found and key not in expected:
            kernel = _base_weight(layer).astype(np.float32)
            if not np.array_equal(found[key].astype(np.float32), kernel):
                raise AdapterError(
                    f"{path}: {key} differs from the base model's weight; the adapter was made for "
                    "another base"
                )


def _base_copies(model: nnx.Module) -> dict[str, Carrier]:
    """Returns the layers whose base weight PEFT may save, by its key: embedding and head."""
    layers = adapted_layers(model) | tied_layers(model)
    return {f"{PREFIX}{name}.base_layer.weight": layer for name, layer in layers.items()}


def _base_weight(layer: Carrier) -> np.ndarray:
    """Returns the weight of an adapted layer as PEFT saves it."""
    matrix = np.asarray(dense(layer.matrix))
    return matrix if layer.linear_map.kind == "lookup" else matrix.T


def _base_shape(layer: Carrier) -> tuple[int, ...]:
    shape = tuple(layer.linear_map.shape)
    return shape if layer.linear_map.kind == "lookup" else shape[::-1]


def _adapted(model: nnx.Module) -> dict[str, Carrier]:
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("the model has no adapters; apply_lora or load_adapter first")
    return layers


def _trained_variables(model: nnx.Module) -> Iterator[tuple[str, str, nnx.Param]]:
    """Yields (module name, attribute, variable) of all that trains, except A and B."""
    for name, module in named_modules(model).items():
        for attribute, value in vars(module).items():
            if isinstance(value, nnx.Param) and not isinstance(value, nnx.LoRAParam):
                yield name, attribute, value


def _trained_parameters(model: nnx.Module) -> Iterator[tuple[str, bool, nnx.Param]]:
    """Yields (PEFT's key without prefix, whether transposed there, variable)."""
    adapted = adapted_layers(model)
    for name, attribute, variable in _trained_variables(model):
        inner = (*name.split("."), "base_layer") if name in adapted else tuple(name.split("."))
        yield *hf_name((*inner, attribute)), variable


def _trained(model: nnx.Module) -> list[tuple[str, str]]:
    return [(name, attribute) for name, attribute, _ in _trained_variables(model)]


def _short_targets(model: nnx.Module, names: list[str]) -> list[str]:
    """Returns the last names of the adapted layers where these suffice, else the full names."""
    modules = named_modules(model)
    linear = [n for n, m in modules.items() if shape_of(m) is not None]
    return short_targets(names, linear, modules.keys() - set(linear))
