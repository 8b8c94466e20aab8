"""The architecture of a decoder, and the fields of config.json that all families share."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lorax.layers.rope import RopeConfig
from lorax.models.config_fields import FIXED_FIELDS
from lorax.models.family import Family, ModelType
from lorax.models.quantization import Quantization
from lorax.models.windows import SLIDING, read_windows, write_windows
from lorax.system.json_fields import JsonFields

_MOST_LAYERS = 1000
"""Several times as many as any model has: a damaged file's number would take hours to set up."""

_DTYPES = {
    "bfloat16": "bfloat16",
    "float16": "float16",
    "half": "float16",
    "float32": "float32",
    "float": "float32",
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer, under Hugging Face's names.

    Attributes:
        family: Its family.
        model_type: One of the family's.
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
        attention_bias: Biases on q, k, v and o.
        qkv_bias: Biases on q, k and v, in any case or with that on o.
        qk_norm: Queries and keys are normalised per head.
        mlp_bias: Biases in the MLP.
        sliding_window: Tokens that a sliding layer sees, itself included.
        layer_types: ``full_attention`` or ``sliding_attention`` per layer.
        bos_token_id: Kept for generation.
        eos_token_id: Kept for generation; may be several.
        pad_token_id: Kept for generation.
        quantization: How its checkpoint stores matrices, if not in 16 or 32 bits.
        notes: Notes for the user on fields that are not read and change nothing.
    """

    family: Family = dataclasses.field(repr=False)
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
    qkv_bias: bool = False
    qk_norm: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    bos_token_id: int | tuple[int, ...] | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | tuple[int, ...] | None = None
    quantization: Quantization | None = dataclasses.field(default=None, compare=False)
    notes: tuple[str, ...] = dataclasses.field(default=(), compare=False, repr=False)

    @property
    def architecture(self) -> str:
        """The transformers class, for example ``LlamaForCausalLM``."""
        return self.family.types[self.model_type].architecture

    def window(self, layer: int) -> int | None:
        """Returns how many tokens the layer sees, itself included, or None for all before it."""
        return self.sliding_window if self.layer_types[layer] == SLIDING else None

    @property
    def context(self) -> int:
        """Returns the length of a sequence that the model was made for, stretching included."""
        stretched = self.rope.original_max_position_embeddings or self.max_position_embeddings
        return max(self.max_position_embeddings, round(stretched * (self.rope.factor or 1.0)))

    def to_hf(self) -> dict[str, Any]:
        """Returns a config.json that transformers 5 and 4 read as this architecture."""
        return self.family.write(self)


def read_decoder(
    family: Family, fields: JsonFields, *, qkv_bias: bool = False, qk_norm: bool = False
) -> DecoderConfig:
    """Reads the fields that all families share: a `Family.read`, or its larger part.

    Fields that are absent take the defaults of the transformers class of the same `model_type`.
    Both ``rope_parameters`` (transformers 5) and ``rope_theta`` with ``rope_scaling`` are
    understood.

    Args:
        family: The model's family.
        fields: The fields of config.json.
        qkv_bias: Whether q, k and v have biases without a field in the file.
        qk_norm: Whether queries and keys are normalised per head.

    Raises:
        ValueError: Naming file and field: missing, of a wrong type, out of range, or of a value
            that lorax does not compute.
    """
    model_type = fields.raw("model_type")
    defaults = family.types[model_type]
    for name, (allowed, reason) in FIXED_FIELDS.items():
        fields.only(name, allowed, reason)
    shape = _read_shape(fields, defaults)
    window, layer_types = read_windows(fields, defaults.window, shape["num_hidden_layers"])
    result = DecoderConfig(
        family=family,
        model_type=model_type,
        **shape,
        vocab_size=fields.integer("vocab_size"),
        intermediate_size=fields.integer("intermediate_size"),
        max_position_embeddings=fields.integer(
            "max_position_embeddings", defaults.max_position_embeddings
        ),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6, minimum=0, above=True),
        rope=RopeConfig.from_hf(fields),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        attention_bias=_read_bias(fields, "attention_bias", defaults.attention_bias),
        mlp_bias=_read_bias(fields, "mlp_bias", defaults.mlp_bias),
        qk_norm=qk_norm,
        sliding_window=window,
        layer_types=layer_types,
        bos_token_id=fields.token_id("bos_token_id"),
        eos_token_id=fields.token_id("eos_token_id"),
        pad_token_id=fields.token_id("pad_token_id"),
    )
    for name in ("qk_norm", "use_qk_norm"):
        fields.only(name, (qk_norm,), f"a {model_type} model is computed so")
    return dataclasses.replace(result, qkv_bias=qkv_bias or result.attention_bias)


def write_decoder(config: DecoderConfig) -> dict[str, Any]:
    """Writes the fields that `read_decoder` reads: a `Family.write`, or its larger part."""
    defaults = config.family.types[config.model_type]
    result: dict[str, Any] = {
        "architectures": [defaults.architecture],
        "model_type": config.model_type,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
    }
    plain = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
        "rms_norm_eps", "tie_word_embeddings",
    )  # fmt: skip
    result |= {name: getattr(config, name) for name in plain}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name)
        result[name] = list(value) if isinstance(value, tuple) else value
    if defaults.attention_bias:
        result["attention_bias"] = config.attention_bias
    if defaults.mlp_bias:
        result["mlp_bias"] = config.mlp_bias
    windows = write_windows(config.sliding_window, config.layer_types, defaults.window)
    return result | config.rope.to_hf() | windows


def stored_dtype(config: Mapping[str, Any], where: str) -> str | None:
    """Returns the dtype of the weights in a config.json, ``dtype`` or ``torch_dtype``.

    None leaves it to the tensors: the field is absent, null or ``auto``.

    Raises:
        ValueError: If it is no name of a dtype that lorax reads.
    """
    fields = JsonFields(config, where)
    found = []
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


def _read_shape(fields: JsonFields, defaults: ModelType) -> dict[str, Any]:
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    default = defaults.num_key_value_heads if "num_key_value_heads" not in fields.values else None
    groups = fields.integer("num_key_value_heads", default or heads)
    if heads % groups:
        raise fields.error("num_key_value_heads", f"must divide num_attention_heads={heads}")
    default = defaults.head_dim if "head_dim" not in fields.values else None
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
