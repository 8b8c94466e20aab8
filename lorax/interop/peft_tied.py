"""Adapters of an embedding that is the output head too, in PEFT's files.

lorax has one table E, (vocabulary, features), so its adapter s·A·B changes the lookup and the head.
PEFT has a module for each. With `ensure_weight_tying` it adapts both alike: its head, E as a
linear layer, has the embedding's B as ``lora_A.weight`` and A as ``lora_B.weight``, and its files
hold both pairs. Without it, PEFT adapts one of the two alone, which no adapter of one table does.

Source: the behaviour of PEFT 0.21 (`BaseTuner._check_tied_modules`).
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax import nnx

from lorax.adapters.lora import LORA
from lorax.adapters.nnx.tree import adapted_layers, named_modules, tied_modules
from lorax.adapters.targets import (
    is_excluded,
    is_target,
    pattern_value,
    refuse_patterns,
)
from lorax.config.adapter import LoraConfig
from lorax.interop.peft_config import CONFIG_FILE, AdapterError, read_adapter_config
from lorax.interop.peft_layout import PREFIX
from lorax.interop.safetensors import TensorEntry, read_tensor
from lorax.layers.carrier import Carrier
from lorax.system.files import read_json

UNTIE = (
    "give the base a head of its own, with transformers: model.lm_head.weight = "
    "torch.nn.Parameter(model.lm_head.weight.detach().clone()), "
    "model.config.tie_word_embeddings = False, model.save_pretrained(…)"
)
_TRANSPOSED = {"lora_A.weight": "lora_embedding_B", "lora_B.weight": "lora_embedding_A"}


def tied_layers(model: nnx.Module) -> dict[str, Carrier]:
    """Returns the adapted layers that are used under another name too, by that name.

    Without those of which single tokens train: PEFT has one for both names.
    """
    layers = {n: layer for n, layer in adapted_layers(model).items() if layer.adapter.spec.r}
    tied = tied_modules(model)
    return {name: layers[source] for name, source in tied.items() if source in layers}


def tied_keys(model: nnx.Module) -> dict[str, str]:
    """Returns the keys of PEFT's tensors that are the transpose of another, by the key of that.

    Raises:
        ValueError: If the adapter of such a layer is more than A and B.
    """
    keys = {}
    for name, layer in tied_layers(model).items():
        source = tied_modules(model)[name]
        method = layer.adapter.spec.method
        if method.parameters.keys() != LORA.parameters.keys():
            raise ValueError(
                f"{source} is {name} too (tie_word_embeddings), for which PEFT has {method.name} "
                f"parameters of its own: use plain LoRA, leave {source} out with "
                "lora.exclude_modules, or merge the adapter into the model"
            )
        for suffix, of_source in _TRANSPOSED.items():
            keys[f"{PREFIX}{name}.{suffix}"] = f"{PREFIX}{source}.{of_source}"
    return keys


def with_tied(tensors: Mapping[str, np.ndarray], model: nnx.Module) -> dict[str, np.ndarray]:
    """Returns the tensors of PEFT's file, with those of the tied head.

    Raises:
        ValueError: As `tied_keys`.
    """
    found = {key: np.ascontiguousarray(tensors[of].T) for key, of in tied_keys(model).items()}
    return {**tensors, **found}


def settings_for(model: nnx.Module, directory: str | Path) -> LoraConfig:
    """Reads an adapter_config.json for a model, which may be of shapes.

    Returns:
        The settings, in which a head that the model ties to its embedding is no target any more.

    Raises:
        AdapterError: As `read_adapter_config`, and if PEFT would compute something else, because
            the model ties what the adapter changes apart.
        TargetError: If a regular expression is none, or takes too long.
    """
    config = read_adapter_config(directory)
    tied = tied_modules(model)
    names = {*tied, *tied.values()}
    refuse_patterns(config, names)
    adapted = [n for n in names if is_target(n, config, names) and not is_excluded(n, config)]
    if not adapted:
        return config
    path = Path(directory) / CONFIG_FILE
    if not read_json(path).get("ensure_weight_tying"):
        raise AdapterError(
            f"{path} adapts {' and '.join(sorted(adapted))} without ensure_weight_tying, so PEFT "
            f"adapts {'them apart' if len(adapted) > 1 else 'it alone'}; but this base has one "
            f"weight for {' and '.join(sorted(names))} (tie_word_embeddings). To keep what the "
            f"adapter computes, {UNTIE}, and load it there"
        )
    if config.use_dora:
        raise AdapterError(
            f"{path}: use_dora of a tied embedding gives the head magnitudes of its own in PEFT; "
            f"{UNTIE}, add lm_head to target_modules, and load it there"
        )
    for name, source in tied.items():
        config = _without_head(config, name, source, named_modules(model).keys(), path)
    return config


def _without_head(config: LoraConfig, head: str, source: str, others, path: Path) -> LoraConfig:
    """Returns settings without a head whose adapter is that of the embedding."""
    both = [_scale_of(name, config) for name in (source, head)]
    if both[0] != both[1]:
        raise AdapterError(
            f"{path}: its patterns give {head} the scale {both[1]:g} and {source}, which is the "
            f"same weight, {both[0]:g}. To keep what the adapter computes, {UNTIE}, add {head} to "
            "target_modules, and load it there"
        )
    exclude = config.exclude_modules
    if isinstance(exclude, str):
        exclude = f"(?:{exclude})|{head}"
    else:
        exclude = (*(exclude or ()), head)
    patterns = {
        field: {p: v for p, v in getattr(config, field).items() if not _names_only(p, head, others)}
        for field in ("rank_pattern", "alpha_pattern")
    }
    return config.model_copy(update={"exclude_modules": exclude, **patterns})


def _scale_of(name: str, config: LoraConfig) -> float:
    r = pattern_value(config.rank_pattern, name, config.r)
    alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
    return alpha / (r**0.5 if config.use_rslora else r)


def _names_only(pattern: str, name: str, others) -> bool:
    """Says whether a pattern matches one name and no other module."""
    chosen = {pattern: True}
    if not pattern_value(chosen, name, False):
        return False
    return not any(pattern_value(chosen, other, False) for other in others if other != name)


def refuse_untied(entries: Mapping[str, TensorEntry], model: nnx.Module, path: Path) -> None:
    """Refuses what was trained apart for head and embedding, on a model that ties them.

    Raises:
        AdapterError: Naming the tensors.
    """
    for name, source in tied_modules(model).items():
        pair = [f"{PREFIX}{n}.weight" for n in (source, name)]
        present = [read_tensor(entries[key]) for key in pair if key in entries]
        if present and not (len(present) == 2 and np.array_equal(present[0], present[1])):
            raise AdapterError(
                f"{path}: {pair[0]} and {pair[1]} must both be there and equal, because the base "
                f"model ties {name} to {source}; this adapter trained them apart "
                "(ensure_weight_tying=false). Merge it with PEFT instead"
            )
    for key, of in tied_keys(model).items():
        if key not in entries or of not in entries:
            continue  # which is said of every key that lacks
        if not np.array_equal(read_tensor(entries[key]), read_tensor(entries[of]).T):
            raise AdapterError(
                f"{path}: {key} must be the transpose of {of}, because the base model has one "
                f"weight for both; this adapter trained them apart. To keep what it computes, "
                f"{UNTIE}, add lm_head to target_modules, and load it there"
            )
