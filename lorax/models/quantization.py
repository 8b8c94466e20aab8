"""The `quantization_config` of a config.json: how the matrices of a checkpoint are stored."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from lorax.system.json_fields import JsonFields

_FIELD = "quantization_config"

# Of LLM.int8(), which a 4-bit checkpoint does not use.
_OF_INT8 = (
    "llm_int8_threshold",
    "llm_int8_has_fp16_weight",
    "llm_int8_enable_fp32_cpu_offload",
)


_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"


@dataclasses.dataclass(frozen=True)
class Quantization:
    """bitsandbytes' NF4, as transformers writes it.

    Attributes:
        double: Whether the scales are quantised too.
        skipped: Modules that are not quantised: regular expressions for the begin of a name, up to
            a dot, or ends of names. None leaves out the head.
    """

    double: bool
    skipped: tuple[str, ...] | None

    def quantises(self, module: str) -> bool:
        """Says whether the matrix of a linear layer is quantised, by transformers' rule.

        Args:
            module: The layer's name, as ``model.layers.0.mlp.up_proj``.
        """
        skipped = ("lm_head",) if self.skipped is None else self.skipped
        return not any(
            module.endswith(name) or re.match(rf"(?:{name}){_BOUNDARY}", module) for name in skipped
        )


def read_quantization(fields: JsonFields) -> Quantization | None:
    """Reads the quantisation of a checkpoint, honouring or refusing every field of it.

    Args:
        fields: The fields of config.json.

    Raises:
        ValueError: Naming file and field, if it is no NF4 of bitsandbytes.
    """
    value = fields.raw(_FIELD, None)
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise fields.error(_FIELD, "must be an object")
    inner = JsonFields(value, fields.where, f"{_FIELD}.")
    advice = "lorax reads bitsandbytes' NF4; of others, name the 16-bit checkpoint, which "
    advice += "model.quantization quantises while it is read"
    _only(inner, "quant_method", "bitsandbytes", advice)
    _only(inner, "load_in_4bit", True, advice)
    _only(inner, "bnb_4bit_quant_type", "nf4", advice, default="fp4")
    # What the library adds to its own fields, for older versions of itself.
    inner.only("load_in_8bit", (False,), advice)
    inner.only("_load_in_4bit", (True,), advice)
    inner.only("_load_in_8bit", (False,), advice)
    double = inner.boolean("bnb_4bit_use_double_quant", False)
    skipped = inner.raw("llm_int8_skip_modules", None)
    if skipped is not None and not _are_patterns(skipped):
        raise inner.error("llm_int8_skip_modules", "must be a list of names of modules")
    # What transformers computes in: lorax has model.dtype. Tensors say how their bytes are seen.
    inner.ignore(("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", *_OF_INT8))
    inner.finish()
    return Quantization(double, None if skipped is None else tuple(skipped))


def _only(fields: JsonFields, name: str, wanted: Any, advice: str, default: Any = None) -> None:
    """Refuses a field that is absent or has another value."""
    if fields.raw(name, default) != wanted:
        shown = "true" if wanted is True else wanted
        raise fields.error(name, f"must be {shown} ({advice})")


def _are_patterns(value: Any) -> bool:
    try:
        return isinstance(value, list) and all(re.compile(one) for one in value)
    except (re.error, TypeError):
        return False
