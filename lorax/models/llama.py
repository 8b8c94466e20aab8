"""Llama 2 and 3, and Mistral: the attention and layer that other families build upon."""

from flax import nnx
from jaxtyping import Array, Float

from lorax.layers.attention import (
    AttentionImplementation,
    Context,
    LayerCache,
    attend,
    attend_cache,
    store,
)
from lorax.layers.linear import Execution, make_linear
from lorax.layers.mlp import MLP
from lorax.layers.norm import RMSNorm
from lorax.layers.rope import rotate
from lorax.layers.together import apply_added, apply_together
from lorax.models.architecture import DecoderConfig, read_decoder, write_decoder
from lorax.models.family import Family, Kept, ModelType
from lorax.models.stack.recompute import GradientCheckpointing, kept

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that read one input."""


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig, index: int, execution: Execution, rngs: nnx.Rngs):
        width = config.hidden_size
        head_dim = config.head_dim
        q_size = config.num_attention_heads * head_dim
        kv_size = config.num_key_value_heads * head_dim
        self.q_proj = make_linear(width, q_size, config.qkv_bias, execution, rngs)
        self.k_proj = make_linear(width, kv_size, config.qkv_bias, execution, rngs)
        self.v_proj = make_linear(width, kv_size, config.qkv_bias, execution, rngs)
        self.o_proj = make_linear(q_size, width, config.attention_bias, execution, rngs)
        self.head_dim = head_dim
        self.sliding_window = config.window(index)
        self.attn_impl: AttentionImplementation = execution.attn_impl

    def __call__(
        self,
        x: Float[Array, "b t d"],
        residual: Float[Array, "b t d"],
        context: Context,
        cache: LayerCache | None,
        empty: bool,
    ) -> tuple[Float[Array, "b t d"], LayerCache | None]:
        """Returns `residual` plus the output, and the cache with this call's tokens added."""

        def heads(y):
            return y.reshape(*x.shape[:2], -1, self.head_dim)

        q, k, v = map(heads, apply_together((self.q_proj, self.k_proj, self.v_proj), x))
        q, k = self.before_rotation(q, k)
        q = kept(rotate(q, *context.rotary))
        k = kept(rotate(k, *context.rotary))
        if cache is not None:
            cache = store(cache, k, v, context.positions, empty=empty)
        window = self.sliding_window
        if cache is None or empty:
            documents = context.documents
            impl = self.attn_impl
            y = attend(q, k, v, documents=documents, sliding_window=window, impl=impl)
        else:
            y = attend_cache(q, *cache, context.positions, sliding_window=window)
        return apply_added(self.o_proj, y.reshape(*x.shape[:2], -1), residual), cache

    def before_rotation(
        self, q: Float[Array, "b t n h"], k: Float[Array, "b t g h"]
    ) -> tuple[Float[Array, "b t n h"], Float[Array, "b t g h"]]:
        """Returns the queries and keys to rotate: the outputs of the projections."""
        return q, k


class DecoderLayer(nnx.Module):
    """``h = x + attention(norm(x)); h + mlp(norm(h))``."""

    attention = Attention

    def __init__(self, config: DecoderConfig, index: int, execution: Execution, rngs: nnx.Rngs):
        width = config.hidden_size
        epsilon = config.rms_norm_eps
        self.self_attn = self.attention(config, index, execution, rngs)
        inner = config.intermediate_size
        bias = config.mlp_bias
        self.mlp = MLP(width, inner, bias, execution, rngs)
        self.input_layernorm = RMSNorm(width, epsilon, execution)
        self.post_attention_layernorm = RMSNorm(width, epsilon, execution)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        context: Context,
        cache: LayerCache | None = None,
        empty: bool = False,
    ) -> tuple[Float[Array, "b t d"], LayerCache | None]:
        """Returns the layer's output and its cache."""
        x, normed = self.input_layernorm.fork(x)
        x, cache = self.self_attn(normed, x, context=context, cache=cache, empty=empty)
        x, normed = self.post_attention_layernorm.fork(kept(x))
        return self.mlp(normed, x, context.repeated), cache


def kept_per_token(config: DecoderConfig, policy: GradientCheckpointing) -> Kept:
    """Returns the activations that a layer stores for the backward pass, as `Family.kept`."""
    d = config.hidden_size
    f = config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    if policy == "full":
        return Kept(d)
    if policy == "offload":
        return Kept(d, attention=q)
    # The layer's input and the sum after attention; q, k, v and attention's output with its
    # normaliser; gate and up.
    elements = 2 * d + 2 * q + 2 * kv + 2 * f
    inputs = tuple((names, d) for names in TOGETHER) if policy == "none" else ()
    return Kept(elements, float32=config.num_attention_heads, inputs=inputs)


LLAMA = Family(
    types={
        "llama": ModelType("LlamaForCausalLM", 2048, attention_bias=True, mlp_bias=True),
        "mistral": ModelType("MistralForCausalLM", 131_072, 8, window="every"),
    },
    read=read_decoder,
    write=write_decoder,
    layer=DecoderLayer,
    kept=kept_per_token,
    together=TOGETHER,
)
