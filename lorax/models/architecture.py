"""The architecture of a decoder, read from and written to a Hugging Face config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lorax.layers.rope import RopeConfig
from lorax.models.config_fields import FIXED_FIELDS, HARMLESS_FIELDS, neutral_kind
from lorax.models.windows import SLIDING, read_windows, write_windows
from lorax.system.json_fields import JsonFields
from lorax.system.wording import show


@dataclasses.dataclass(frozen=True)
class _Family:
    """What a transformers configuration class assumes where config.json is silent."""

    architecture: str
    max_position_embeddings: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention_bias: bool = False  # has the field
    mlp_bias: bool = False  # has the field
    window: str = "none"  # none, every layer, or by layer_types


_MOST_LAYERS = 1000
"""Several times what any model has: the layers of a damaged file would take hours to lay out."""

_FAMILIES = {
    "llama": _Family("LlamaForCausalLM", 2048, attention_bias=True, mlp_bias=True),
    "mistral": _Family("MistralForCausalLM", 131_072, 8, window="every"),
    "qwen2": _Family("Qwen2ForCausalLM", 32_768, 32, window="layers"),
    "qwen3": _Family("Qwen3ForCausalLM", 32_768, 32, 128, attention_bias=True, window="layers"),
}

_DTYPES = {
    "bfloat16": "bfloat16",
    "float16": "float16",
    "half": "float16",
    "float32": "float32",
    "float": "float32",
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer of the Llama family, under Hugging Face's names.

    Attributes:
        model_type: llama, mistral, qwen2 or qwen3.
        vocab_size: Rows of the embedding.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the MLP.
        num_hidden_layers: Layers.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads; divides the query heads.
        head_dim: Width of a head.
        max_position_embeddings: Context; read by some rotary scalings, never a limit.
        rms_norm_eps: Added to the mean square.
        rope: Rotary embedding.
        tie_word_embeddings: The head is the transposed embedding.
        attention_bias: Biases on q, k, v and o (Qwen2 has those of q, k and v in any case).
        mlp_bias: Biases in the MLP.
        sliding_window: Tokens that a sliding layer sees, itself included.
        layer_types: ``full_attention`` or ``sliding_attention`` per layer.
        bos_token_id: Kept for generation.
        eos_token_id: Kept for generation; may be several.
        pad_token_id: Kept for generation.
        notes: What of the file is not read and changes nothing, for the user to know.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    bos_token_id: int | tuple[int, ...] | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | tuple[int, ...] | None = None
    notes: tuple[str, ...] = dataclasses.field(default=(), compare=False, repr=False)

    @property
    def architecture(self) -> str:
        """The transformers class, for example ``LlamaForCausalLM``."""
        return _FAMILIES[self.model_type].architecture

    @property
    def qkv_bias(self) -> bool:
        """Whether q, k and v have biases."""
        return self.attention_bias or self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head."""
        return self.model_type == "qwen3"

    def window(self, layer: int) -> int | None:
        """Returns how many tokens the layer sees, itself included, or None for all before it."""
        return self.sliding_window if self.layer_types[layer] == SLIDING else None

    @property
    def context(self) -> int:
        """Returns the tokens of a row that the model was made for, stretching included."""
        stretched = self.rope.original_max_position_embeddings or self.max_position_embeddings
        return max(self.max_position_embeddings, round(stretched * (self.rope.factor or 1.0)))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str) -> "DecoderConfig":
        """Reads the contents of a config.json, honouring or refusing every field.

        Fields that are absent take the defaults of the transformers class of the same
        `model_type`. Both ``rope_parameters`` (transformers 5) and ``rope_theta`` with
        ``rope_scaling`` are understood.

        Args:
            config: The parsed file.
            where: Its path, for messages.

        Raises:
            ValueError: Naming file and field: unknown (with the nearest known name), missing, of
                a wrong type, out of range, or of a value that lorax does not compute. What is
                unknown and cannot change anything goes into `notes` instead.
        """
        fields = JsonFields(config, where)
        model_type = _read_model_type(fields)
        family = _FAMILIES[model_type]
        _check_architectures(fields, family)
        stored_dtype(config, where)
        for name, (allowed, reason) in FIXED_FIELDS.items():
            fields.only(name, allowed, reason)
        shape = _read_shape(fields, family)
        layers = shape["num_hidden_layers"]
        window, layer_types = read_windows(fields, family.window, layers)
        result = cls(
            model_type=model_type,
            **shape,
            vocab_size=fields.integer("vocab_size"),
            intermediate_size=fields.integer("intermediate_size"),
            max_position_embeddings=fields.integer(
                "max_position_embeddings", family.max_position_embeddings
            ),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6, minimum=0, above=True),
            rope=RopeConfig.from_hf(fields),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            attention_bias=_read_bias(fields, "attention_bias", family.attention_bias),
            mlp_bias=_read_bias(fields, "mlp_bias", family.mlp_bias),
            sliding_window=window,
            layer_types=layer_types,
            bos_token_id=fields.token_id("bos_token_id"),
            eos_token_id=fields.token_id("eos_token_id"),
            pad_token_id=fields.token_id("pad_token_id"),
        )
        for names in HARMLESS_FIELDS.values():
            fields.ignore(names)
        fields.ignore(("dtype", "torch_dtype"))
        for name in ("qk_norm", "use_qk_norm"):
            fields.only(name, (result.qk_norm,), f"a {model_type} model is computed so")
        fields.finish(neutral_kind)
        return dataclasses.replace(result, notes=tuple(fields.notes))

    def to_hf(self) -> dict[str, Any]:
        """Returns a config.json that transformers 5 and 4 read as this architecture."""
        family = _FAMILIES[self.model_type]
        config: dict[str, Any] = {
            "architectures": [family.architecture],
            "model_type": self.model_type,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
        }
        plain = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
            "rms_norm_eps", "tie_word_embeddings",
        )  # fmt: skip
        config |= {name: getattr(self, name) for name in plain}
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            config[name] = list(value) if isinstance(value, tuple) else value
        if family.attention_bias:
            config["attention_bias"] = self.attention_bias
        if family.mlp_bias:
            config["mlp_bias"] = self.mlp_bias
        return (
            config
            | self.rope.to_hf()
            | write_windows(self.sliding_window, self.layer_types, family.window)
        )


def stored_dtype(config: Mapping[str, Any], where: str) -> str | None:
    """Returns what a config.json says of the dtype of its weights, as ``dtype`` or ``torch_dtype``.

    None leaves it to the tensors, which carry theirs: the field is absent, null or ``auto``.

    Raises:
        ValueError: If it is no name of a dtype that lorax reads.
    """
    fields, found = JsonFields(config, where), []
    for name in ("dtype", "torch_dtype"):
        value = fields.raw(name, "auto")
        known = isinstance(value, str) and value.removeprefix("torch.")
        if value != "auto" and known not in _DTYPES:
            raise fields.error(
                name,
                "must be bfloat16, float16 or float32, in which weights are stored, or auto or "
                "absent, which leaves it to the tensors",
            )
        found.append(_DTYPES.get(str(known)))
    return found[0] or found[1]  # as transformers takes the first


def _read_model_type(fields: JsonFields) -> str:
    value = fields.raw("model_type", None)
    if value is None:
        raise ValueError(
            f"{fields.where}: model_type is missing; it must be one of {', '.join(_FAMILIES)}"
        )
    if not isinstance(value, str) or value not in _FAMILIES:
        raise fields.error("model_type", f"must be one of {', '.join(_FAMILIES)}")
    return value


def _check_architectures(fields: JsonFields, family: _Family) -> None:
    """Refuses a class that is another model's, or no causal language model."""
    value = fields.raw("architectures", None)
    names = value if isinstance(value, list) else [value]
    supported = {f.architecture.lower(): f.architecture for f in _FAMILIES.values()}
    others = set(supported) - {family.architecture.lower()}
    for name in names if value is not None else ():
        if not isinstance(name, str) or not name.endswith("ForCausalLM"):
            listed = ", ".join(supported.values())
            raise fields.error(
                "architectures", f"must be a causal language model that lorax reads: {listed}"
            )
        if name.lower() in others:
            needed = f"must be {family.architecture}, as model_type says"
            raise fields.error("architectures", needed)
        if name.lower() not in supported:
            fields.note(
                f"architectures={show(name)} is not known to lorax: model_type decides, so it "
                f"is computed as {family.architecture}"
            )


def _read_shape(fields: JsonFields, family: _Family) -> dict[str, Any]:
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    default = family.num_key_value_heads if "num_key_value_heads" not in fields.values else None
    groups = fields.integer("num_key_value_heads", default or heads)
    if heads % groups:
        raise fields.error("num_key_value_heads", f"must divide num_attention_heads={heads}")
    default = family.head_dim if "head_dim" not in fields.values else None
    head_dim = fields.integer("head_dim", default)
    if head_dim is None:
        if hidden % heads:
            raise fields.error("hidden_size", f"must be a multiple of num_attention_heads={heads}")
        head_dim = hidden // heads
    if head_dim % 2:
        raise ValueError(f"{fields.where}: head_dim must be even to be rotated, got {head_dim}")
    return {
        "hidden_size": hidden,
        "num_hidden_layers": fields.integer("num_hidden_layers", maximum=_MOST_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
    }


def _read_bias(fields: JsonFields, name: str, has_field: bool) -> bool:
    value = fields.boolean(name, False)
    if value and not has_field:
        reason = "transformers ignores it for this model_type"
        raise fields.error(name, f"must be absent or false ({reason})")
    return value
