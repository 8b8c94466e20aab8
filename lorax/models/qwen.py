"""Qwen2, 2.5 and 3: Llama's layer with biases on q, k and v (2), or norms of q and k (3)."""

import dataclasses

from flax import nnx
from jaxtyping import Array, Float

from lorax.layers.linear import Execution
from lorax.layers.norm import RMSNorm
from lorax.models import llama
from lorax.models.architecture import DecoderConfig, read_decoder, write_decoder
from lorax.models.family import Family, Kept, ModelType
from lorax.models.stack.recompute import REPEATING, GradientCheckpointing
from lorax.system.json_fields import JsonFields


class Attention(llama.Attention):
    """Llama's attention, with queries and keys normalised per head where `qk_norm` is set."""

    def __init__(self, config: DecoderConfig, index: int, execution: Execution, rngs: nnx.Rngs):
        super().__init__(config, index, execution, rngs)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, execution)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, execution)

    def before_rotation(
        self, q: Float[Array, "b t n h"], k: Float[Array, "b t g h"]
    ) -> tuple[Float[Array, "b t n h"], Float[Array, "b t g h"]]:
        """Returns the queries and keys to rotate, normalised or as they are."""
        return (self.q_norm(q), self.k_norm(k)) if self.qk_norm else (q, k)


class DecoderLayer(llama.DecoderLayer):
    """Llama's layer, with this attention."""

    attention = Attention


def read(family: Family, fields: JsonFields) -> DecoderConfig:
    """Reads a config.json, as `Family.read`."""
    normalised = fields.raw("model_type") == "qwen3"
    return read_decoder(family, fields, qkv_bias=not normalised, qk_norm=normalised)


def kept_per_token(config: DecoderConfig, policy: GradientCheckpointing) -> Kept:
    """Returns the activations that a layer stores for the backward pass, as `Family.kept`."""
    result = llama.kept_per_token(config, policy)
    if not config.qk_norm or policy in REPEATING:
        return result
    heads = config.num_attention_heads + config.num_key_value_heads
    unnormalised = heads * config.head_dim  # queries and keys before their norms
    return dataclasses.replace(result, elements=result.elements + unnormalised)


QWEN = Family(
    types={
        "qwen2": ModelType("Qwen2ForCausalLM", 32_768, 32, window="layers"),
        "qwen3": ModelType(
            "Qwen3ForCausalLM", 32_768, 32, 128, attention_bias=True, window="layers"
        ),
    },
    read=read,
    write=write_decoder,
    layer=DecoderLayer,
    kept=kept_per_token,
    together=llama.TOGETHER,
)
