"""Reading and writing adapters in PEFT's format: adapter_config.json, adapter_model.safetensors."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorax.adapters.lora import LORA
from lorax.adapters.method import Params, Spec
from lorax.adapters.nnx.adapter import rank_of
from lorax.adapters.nnx.apply import apply_lora
from lorax.adapters.nnx.tree import (
    adapted_layers,
    layers_with_adapters,
    named_modules,
    tied_modules,
)
from lorax.adapters.sites import shape_of
from lorax.adapters.targets import TargetError, match_targets
from lorax.config.adapter import LoraConfig
from lorax.interop.peft_config import CONFIG_FILE, AdapterError
from lorax.interop.peft_layout import PREFIX, file_key, file_shape, from_file, to_file
from lorax.interop.peft_tied import refuse_untied, settings_for, tied_keys, tied_layers, with_tied
from lorax.interop.safetensors import TensorEntry, read_headers, read_tensor, save_tensors
from lorax.interop.tensors import hf_name
from lorax.layers.carrier import Carrier
from lorax.models.decoder import CausalLM
from lorax.system.arguments import check_kind
from lorax.system.files import write_folder
from lorax.system.wording import clip
from lorax_kernels import dense

TENSOR_FILE = "adapter_model.safetensors"

type AdapterFormat = Literal["peft", "peft-portable"]


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
    specs = {n: _as_saved(layer)[0] for n, layer in (layers | tied).items()}
    ranks = {n: spec.r for n, spec in specs.items()}
    alphas = {n: spec.lora_alpha for n, spec in specs.items()}
    r, alpha = (Counter(v.values()).most_common(1)[0][0] for v in (ranks, alphas))
    if portable:
        r = alpha = max(ranks.values())
        ranks = {}
        alphas = {}

    def pattern(values, common):
        return {re.escape(n): v for n, v in values.items() if v != common}

    saved = _saved_modules(model)
    method = LORA if portable else next(iter(specs.values())).method
    config = {
        **method.settings,
        "task_type": "CAUSAL_LM" if isinstance(model, CausalLM) else None,
        "base_model_name_or_path": base_model_name_or_path,
        "revision": revision,
        "inference_mode": True,
        "r": r,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": max(spec.dropout for spec in specs.values()),
        "target_modules": _short_targets(model, list(layers)),
        "exclude_modules": None,
        "bias": _bias_setting(model, layers),
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": not portable and any(spec.use_rslora for spec in specs.values()),
        "modules_to_save": saved or None,
        "rank_pattern": pattern(ranks, r),
        "alpha_pattern": pattern(alphas, alpha),
        "layers_to_transform": None,
        "layers_pattern": None,
        "layer_replication": None,
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


def _as_saved(layer: Carrier) -> tuple[Spec, Params]:
    """Returns a layer's adapter as one on the original base; see `Method.plain`."""
    spec = layer.adapter.spec
    return spec.method.plain(spec, layer.adapter.values)


def adapter_tensors(model: nnx.Module, *, portable: bool = False) -> dict[str, np.ndarray]:
    """Returns the tensors of adapter_model.safetensors: A as (r, in), B as (out, r), float32.

    With `portable`, every pair is zero-padded to the largest rank and its scale folded into B.
    """
    layers = _adapted(model)
    rank = max(rank_of(layer) for layer in layers.values())
    tensors = {}
    for name, layer in layers.items():
        spec, values = _as_saved(layer)
        parameters = (LORA if portable else spec.method).parameters
        if portable:
            values = portable_values(spec, layer.adapter.values, rank)
        for parameter, about in parameters.items():
            key = f"{PREFIX}{name}.{file_key(layer.linear_map, about)}"
            tensors[key] = to_file(layer.linear_map, about, np.asarray(values[parameter]))
    tensors = with_tied(tensors, model)
    extra = trained_base_tensors(model)
    if portable and extra:
        raise ValueError(
            f"peft-portable holds A and B only, but this run also trained {', '.join(extra)}; "
            "export it as peft or merged"
        )
    return tensors | extra


def portable_values(spec: Spec, values: Params, rank: int) -> dict[str, np.ndarray]:
    """Returns a layer's A and B of one rank, the scale within B; see `Method.portable`.

    Raises:
        ValueError: If its adapter is more than they hold.
    """
    try:
        return spec.method.portable(spec, values, rank)
    except ValueError as error:
        raise ValueError(
            f"peft-portable holds A and B only, but {error}; export peft or merged"
        ) from None


def trained_base_tensors(model: nnx.Module) -> dict[str, np.ndarray]:
    """Returns the trained base tensors (biases, `modules_to_save`) under PEFT's names."""
    tensors = {}
    for key, transposed, variable in _trained_parameters(model):
        value = np.asarray(variable.get_value())
        tensors[PREFIX + key] = np.ascontiguousarray(value.T if transposed else value)
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

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If `directory` holds something, a value is not finite, or the format cannot
            hold what was trained.
    """
    check_kind("model", model, nnx.Module, "an nnx.Module with adapters")
    check_kind("directory", directory, (str, os.PathLike), "the path of a folder")
    portable = format == "peft-portable"
    tensors = adapter_tensors(model, portable=portable)
    bad = [name for name, value in tensors.items() if not np.isfinite(value).all()]
    if bad:
        raise ValueError(f"not saved: {bad[0]} holds values that are not finite")
    config = adapter_config(
        model,
        base_model_name_or_path=base_model_name_or_path,
        revision=revision,
        portable=portable,
    )
    with write_folder(directory) as folder:
        save_tensors(tensors, folder / TENSOR_FILE)
        text = json.dumps(config, indent=2, sort_keys=True)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
    return Path(directory)


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
        adapted = apply_lora(model, config, rngs=nnx.Rngs(0))
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
    path = _tensor_file(Path(directory))
    entries = read_headers([path])
    expected = _expected_shapes(model)
    refuse_untied(entries, model, path)
    copies = {key: _base_shape(layer) for key, layer in _base_copies(model).items()}
    for label, keys in (
        ("lacks", expected.keys() - entries.keys()),
        ("has unexpected", entries.keys() - expected.keys() - copies.keys()),
    ):
        if keys:
            first = clip(sorted(keys)[0])
            raise AdapterError(f"{path} {label} {len(keys)} tensors, first {first}")
    for key, entry in entries.items():
        needed = expected[key] if key in expected else copies[key]
        if entry.shape != needed:
            raise AdapterError(f"{path}: {key} has shape {entry.shape}, needed {needed}")
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
        shapes[PREFIX + key] = shape[::-1] if transposed else shape
    for name, source in tied_modules(model).items():
        if (shared := f"{PREFIX}{source}.weight") in shapes:
            shapes[f"{PREFIX}{name}.weight"] = shapes[shared]
    return shapes


def _tensor_file(directory: Path) -> Path:
    path = directory / TENSOR_FILE
    if not path.exists() and (directory / "adapter_model.bin").exists():
        raise AdapterError(
            f"{directory}: adapter_model.bin is a pickle and is never loaded; save it again with "
            "PEFT's save_pretrained(safe_serialization=True)"
        )
    return path


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
        variable.set_value(jnp.asarray(value.T if transposed else value, dtype))


def _check_values(found: dict[str, np.ndarray], model: nnx.Module, path: Path) -> None:
    """Refuses values that are not finite, and copies of another base's weights."""
    for key, value in found.items():
        if not np.isfinite(value.astype(np.float32)).all():
            raise AdapterError(f"{path}: {key} holds values that are not finite")
    expected = _expected_shapes(model)
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


def _saved_modules(model: nnx.Module) -> list[str]:
    """Returns the modules trained in full, by their full names."""
    return sorted({n for n, attribute, _ in _trained_variables(model) if attribute != "bias"})


def _bias_setting(model: nnx.Module, layers: dict[str, Carrier]) -> str:
    saved = set(_saved_modules(model))
    biases = {n for n, a, _ in _trained_variables(model) if a == "bias" and n not in saved}
    if not biases:
        return "none"
    return "lora_only" if biases <= layers.keys() else "all"


def _short_targets(model: nnx.Module, names: list[str]) -> list[str]:
    """Returns the last names of the adapted layers where these suffice, else the full names."""
    short = sorted({n.split(".")[-1] for n in names})
    modules = named_modules(model)
    linear = [n for n, m in modules.items() if shape_of(m) is not None]
    config = LoraConfig(target_modules=tuple(short))
    others = modules.keys() - set(linear)
    try:
        again = [t.name for t in match_targets(linear, others, config)]
    except ValueError:
        return sorted(names)
    return short if again == names else sorted(names)
