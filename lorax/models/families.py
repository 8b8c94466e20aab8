"""The list of model families, and reading a config.json by its family."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lorax.models.architecture import DecoderConfig, stored_dtype
from lorax.models.config_fields import HARMLESS_FIELDS, neutral_kind
from lorax.models.family import Family, ModelType
from lorax.models.llama import LLAMA
from lorax.models.quantization import read_quantization
from lorax.models.qwen import QWEN
from lorax.system.json_fields import JsonFields
from lorax.system.wording import show

FAMILIES: list[Family] = [LLAMA, QWEN]


def read_architecture(config: Mapping[str, Any], where: str) -> DecoderConfig:
    """Reads the contents of a config.json, honouring or refusing every field.

    Args:
        config: The parsed file.
        where: Its path, for messages.

    Raises:
        ValueError: Naming file and field: unknown (with the nearest known name), or refused by the
            model's family (see `lorax.models.architecture.read_decoder`). Unknown fields that
            cannot change anything go into `DecoderConfig.notes` instead.
    """
    fields = JsonFields(config, where)
    family, model_type = _read_model_type(fields)
    _check_architectures(fields, family.types[model_type])
    stored_dtype(config, where)
    quantization = read_quantization(fields)
    result = family.read(family, fields)
    for names in HARMLESS_FIELDS.values():
        fields.ignore(names)
    fields.ignore(("dtype", "torch_dtype"))
    fields.finish(neutral_kind)
    return dataclasses.replace(result, quantization=quantization, notes=tuple(fields.notes))


def _read_model_type(fields: JsonFields) -> tuple[Family, str]:
    known = {name: family for family in FAMILIES for name in family.types}
    value = fields.raw("model_type", None)
    if value is None:
        raise ValueError(
            f"{fields.where}: model_type is missing; it must be one of {', '.join(known)}"
        )
    if not isinstance(value, str) or value not in known:
        raise fields.error("model_type", f"must be one of {', '.join(known)}")
    return known[value], value


def _check_architectures(fields: JsonFields, model_type: ModelType) -> None:
    """Refuses a class of another model, or of no causal language model."""
    value = fields.raw("architectures", None)
    names = value if isinstance(value, list) else [value]
    needed = model_type.architecture
    every = [name for family in FAMILIES for name in family.architectures]
    supported = {name.lower() for name in every}
    for name in names if value is not None else ():
        if not isinstance(name, str) or not name.endswith("ForCausalLM"):
            listed = ", ".join(dict.fromkeys(every))
            raise fields.error(
                "architectures", f"must be a causal language model that lorax reads: {listed}"
            )
        if name.lower() in supported - {needed.lower()}:
            raise fields.error("architectures", f"must be {needed}, by its model_type")
        if name.lower() not in supported:
            fields.note(
                f"architectures={show(name)} is not known to lorax: model_type decides, so it "
                f"is computed as {needed}"
            )
