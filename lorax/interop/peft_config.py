"""Reading adapter_config.json: the settings of LoRA, and fields of methods that lorax lacks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorax.adapters.methods import METHODS
from lorax.config.adapter import LoraConfig
from lorax.config.explain import ConfigError
from lorax.config.file import check_model
from lorax.system.files import read_json
from lorax.system.wording import clip, show

CONFIG_FILE = "adapter_config.json"

# Fields that lorax's LoraConfig also has, but those of the first values, of which PEFT has more.
_SHARED_FIELDS = [
    name for name in LoraConfig.model_fields if name not in ("init_lora_weights", "eva_config")
]

# Fields that cannot change what a loaded adapter computes.
_NEUTRAL_FIELDS = {
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "megatron_config",
    "megatron_core",
    "runtime_config",
    "ensure_weight_tying",
    "qalora_group_size",  # only read with use_qalora
    # Settings of the first values of A and B (`init_lora_weights`); these are trained now.
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "loftq_config",
    # For transformers' Conv1D alone, which is no convolution: PEFT sets it to false for others.
    "fan_in_fan_out",
}

# Named initialisations that do not change the base; all others change it before training.
_PLAIN_INITIALISATIONS = ("gaussian", "orthogonal", "eva", "mica")

# Those that PEFT repeats on loading, from the base alone; so does lorax.
_REPEATED_INITIALISATIONS = ("pissa", "olora")

_MERGE = (
    "merge with PEFT (PeftModel.from_pretrained(…).merge_and_unload()) and take the merged model"
)
_KEEP = "PEFT cannot merge it and no plain LoRA does the same: use it with PEFT itself"
_CONVERT = (
    "convert it where it was trained, with save_pretrained(…, "
    "path_initial_model_for_weight_conversion=…) of PEFT"
)

# Fields of other methods than LoRA, the reason, and the remedy. PEFT 0.21 was run for each.
_OTHER_METHODS = {
    "kasa_config": ("KaSA cuts singular values off the base", _MERGE),
    "use_bdlora": ("BD-LoRA keeps blocks of A or B only", _MERGE),
    "velora_config": ("VeLoRA keeps more than A and B", _MERGE),
    "monteclora_config": ("Monteclora keeps more than A and B", _MERGE),
    "target_parameters": ("parameters without a linear layer are adapted", _MERGE),
    "alora_invocation_tokens": (
        "aLoRA adapts only the tokens from the invocation on, and without this field all would be",
        _KEEP,
    ),
    "arrow_config": ("Arrow chooses among several adapters for each token", _KEEP),
    "layer_replication": ("layers of the base are used more than once", _KEEP),
    "use_qalora": ("QALoRA pools the inputs of a quantised base", _KEEP),
}


class AdapterError(ValueError):
    """An adapter folder that cannot be loaded as it stands."""


def read_adapter_config(directory: str | Path) -> LoraConfig:
    """Reads adapter_config.json, refusing every field that lorax does not implement.

    Raises:
        AdapterError: Naming the file, the fields, their values and what to do; all at once.
    """
    path = Path(directory) / CONFIG_FILE
    raw = read_json(path)
    types = sorted({method.settings["peft_type"] for method in METHODS})
    if (found := raw.get("peft_type")) not in types:
        raise AdapterError(f"{path}: peft_type must be {' or '.join(types)}, got {show(found)}")
    if problems := [*_other_methods(raw), *_check_names(raw)]:
        raise AdapterError("\n".join(f"{path}: {problem}" for problem in problems))
    # PEFT treats empty values as absent.
    fields = {f: raw[f] for f in _SHARED_FIELDS if raw.get(f) not in (None, [], "", {})}
    start = str(raw.get("init_lora_weights")).lower()
    if start in _REPEATED_INITIALISATIONS:
        fields["init_lora_weights"] = start
    fields.setdefault("r", 8)
    fields.setdefault("lora_alpha", 8)
    if not fields.get("target_modules"):
        raise AdapterError(f"{path}: target_modules is missing; lorax does not guess it")
    try:
        return check_model(LoraConfig, fields, str(path))
    except ConfigError as error:
        raise AdapterError(str(error)) from None


def read_base_name(directory: str | Path) -> tuple[str | None, str | None]:
    """Returns the base model in adapter_config.json, and its revision, if recorded.

    Raises:
        AdapterError: If one of them is no text.
    """
    path = Path(directory) / CONFIG_FILE
    raw = read_json(path)
    if problems := _check_names(raw):
        raise AdapterError("\n".join(f"{path}: {problem}" for problem in problems))
    return raw.get("base_model_name_or_path") or None, raw.get("revision") or None


def adapter_notes(directory: str | Path, *, trains: bool = True) -> list[str]:
    """Returns notes on an adapter that loads.

    Args:
        directory: Its folder.
        trains: Whether it is trained on: then they say how that differs from PEFT's training.
    """
    path = Path(directory) / CONFIG_FILE
    raw = read_json(path)
    notes = []
    if raw.get("fan_in_fan_out"):
        notes.append("fan_in_fan_out is not read: it is for other layers than linear ones")
    if trains:
        notes += _differences(raw)
    return [f"{path}: {note}" for note in notes]


def _differences(raw: dict[str, Any]) -> Iterator[str]:
    """Yields how further training differs from PEFT's."""
    if str(raw.get("init_lora_weights")).lower() == "mica":
        yield "MiCA trained A alone; lorax trains A and B"
    if raw.get("ensure_weight_tying") and "embed_tokens" in str(raw.get("target_modules")):
        yield (
            "with ensure_weight_tying PEFT steps A and B of a tied embedding as those of the "
            "lookup, and as those of the head, with lora_dropout; lorax steps them once, without"
        )
    if raw.get("use_dora") and raw.get("lora_dropout"):
        yield (
            "with use_dora PEFT's lora_dropout also drops inputs of the frozen weight; lorax drops "
            "those of A alone"
        )


def _check_names(raw: dict[str, Any]) -> list[str]:
    return [
        f"{name} must be text or null, got {show(raw[name])}"
        for name in ("base_model_name_or_path", "revision")
        if not isinstance(raw.get(name), str | None)
    ]


def _other_methods(raw: dict[str, Any]) -> list[str]:
    """Describes each field of another method than LoRA: its effect, and the remedy."""
    problems = _initialisation(raw.get("init_lora_weights", True))
    known = {*_SHARED_FIELDS, *_NEUTRAL_FIELDS, "peft_type", "init_lora_weights"}
    for field, value in raw.items():
        if field in known or value is None or value is False or value in ([], {}, ""):
            continue
        if field in _OTHER_METHODS and not value:  # a 0, which PEFT takes for false
            continue
        reason, remedy = _OTHER_METHODS.get(
            field,
            (
                "lorax does not know it, and it may change what the adapter computes",
                "merge with the PEFT that wrote it, and take the merged model",
            ),
        )
        problems.append(f"{clip(field)}={show(value)} is not supported; {remedy} ({reason})")
    return problems


def _initialisation(value: Any) -> list[str]:
    """Returns the problem of an initialisation that changes the base of A and B."""
    if not value or value is True:  # PEFT treats 0 and empty values as false
        return []
    if not isinstance(value, str):
        return [
            f"init_lora_weights must be true, false, null or a name, got {show(value)}, with which "
            "PEFT fails too: write true, since A and B are in the file whatever they began with"
        ]
    name = value.lower()
    if name in (*_PLAIN_INITIALISATIONS, *_REPEATED_INITIALISATIONS):
        return []
    remedy = _CONVERT
    if name == "loftq":
        remedy = "use it with PEFT, on the base that LoftQ quantised"
    return [
        f"init_lora_weights={show(value)} changes the base weights before training, so A and B "
        f"belong to another base than the one that is named; {remedy}"
    ]
