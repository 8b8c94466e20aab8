"""The layer of Llama, Mistral and Qwen: attention and feed-forward."""

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
from lorax.models.architecture import DecoderConfig
from lorax.models.stack.recompute import kept


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig, index: int, execution: Execution, rngs: nnx.Rngs):
        width, head_dim = config.hidden_size, config.head_dim
        q_size = config.num_attention_heads * head_dim
        kv_size = config.num_key_value_heads * head_dim
        self.q_proj = make_linear(width, q_size, config.qkv_bias, execution, rngs)
        self.k_proj = make_linear(width, kv_size, config.qkv_bias, execution, rngs)
        self.v_proj = make_linear(width, kv_size, config.qkv_bias, execution, rngs)
        self.o_proj = make_linear(q_size, width, config.attention_bias, execution, rngs)
        self.qk_norm, self.head_dim = config.qk_norm, head_dim
        if self.qk_norm:
            self.q_norm = RMSNorm(head_dim, config.rms_norm_eps, execution)
            self.k_norm = RMSNorm(head_dim, config.rms_norm_eps, execution)
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
        heads = lambda y: y.reshape(*x.shape[:2], -1, self.head_dim)
        q, k, v = map(heads, apply_together((self.q_proj, self.k_proj, self.v_proj), x))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = kept(rotate(q, *context.rotary)), kept(rotate(k, *context.rotary))
        if cache is not None:
            cache = store(cache, k, v, context.positions, empty=empty)
        window = self.sliding_window
        if cache is None or empty:
            documents, impl = context.documents, self.attn_impl
            y = attend(q, k, v, documents=documents, sliding_window=window, impl=impl)
        else:
            y = attend_cache(q, *cache, context.positions, sliding_window=window)
        return apply_added(self.o_proj, y.reshape(*x.shape[:2], -1), residual), cache


class DecoderLayer(nnx.Module):
    """``h = x + attention(norm(x)); h + mlp(norm(h))``."""

    def __init__(self, config: DecoderConfig, index: int, execution: Execution, rngs: nnx.Rngs):
        width, epsilon = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, index, execution, rngs)
        inner, bias = config.intermediate_size, config.mlp_bias
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
        x, cache = self.self_attn(normed, x, context, cache, empty)
        x, normed = self.post_attention_layernorm.fork(kept(x))
        return self.mlp(normed, x, context.repeated), cache
