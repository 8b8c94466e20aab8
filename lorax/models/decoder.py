"""The decoder: embedding, layers, head, and their cache."""

from typing import Any, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lorax.devices.mesh import refuse_explicit_axes
from lorax.devices.specs import Parts
from lorax.layers.attention import (
    AttentionImplementation,
    Context,
    KVCache,
    Rotary,
    resolve_implementation,
)
from lorax.layers.documents import (
    DocumentLayout,
    Documents,
    document_lengths,
    find_documents,
    too_many_documents,
)
from lorax.layers.linear import INITIAL_DEVIATION, Execution, make_linear
from lorax.layers.norm import RMSNorm
from lorax.layers.rope import rotary_tables
from lorax.models.architecture import DecoderConfig
from lorax.models.noise import EmbeddingNoise
from lorax.models.stack.recompute import (
    GradientCheckpointing,
    Recomputation,
    check_kept_layers,
    check_policy,
)
from lorax.models.stack.run import run_layers
from lorax_kernels import Kernels


class Decoder(nnx.Module):
    """Embedding, layers and final norm; run by `CausalLM.hidden_states`."""

    def __init__(self, config: DecoderConfig, execution: Execution, rngs: nnx.Rngs):
        self.embed_tokens = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=execution.dtype,
            param_dtype=execution.param_dtype,
            embedding_init=nnx.initializers.normal(INITIAL_DEVIATION),
            rngs=rngs,
        )
        self.layers = nnx.List(
            config.family.layer(config, index, execution, rngs)
            for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, execution)


class TiedHead(nnx.Module):
    """The output head of a model with tied embeddings: ``x · embeddingᵀ``."""

    def __init__(self, embed_tokens: nnx.Embed):
        self.embed_tokens = embed_tokens

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch v"]:
        """Returns the logits in the compute dtype."""
        return self.embed_tokens.attend(x)


class CausalLM(nnx.Module):
    """A decoder with its output head; modules are named as in Hugging Face's checkpoints.

    Every weight is read through its module, so linear layers may be replaced by anything that is
    called the same way, and the model may be split and merged anywhere.

    Args:
        config: The architecture.
        dtype: Dtype of activations and matmuls.
        param_dtype: Dtype of the new weights.
        attn_impl: Implementation of attention: see `lorax.layers.attention.resolve_implementation`.
        gradient_checkpointing: What the backward pass recomputes instead of storing it: "none";
            "selective" elementwise work (the norms' outputs and the MLP's inner activation), never
            a matmul or attention; "full" each layer, of which only the input and x·A are stored;
            "offload" likewise, except cuDNN's attention, with stored arrays in the host's memory.
        kept_layers: How many layers, counted from the last, "full" and "offload" treat as
            "selective" does.
        rngs: Source of the weights (stream ``params``): normal with deviation 0.02, biases 0.

    Attributes:
        config: The architecture.
        dtype: Dtype of activations and matmuls.
        document_layout: Length and number of the documents of packed sequences; if it is None,
            cuDNN gets a mask, and takes longer.
        kernels: Backend of the loss: see `lorax_kernels.token_nll_and_gradient`.
        noise: What is added to the embeddings in training; None is nothing.
    """

    lm_head: Any

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        attn_impl: AttentionImplementation = "auto",
        gradient_checkpointing: GradientCheckpointing = "none",
        kept_layers: int = 1,
        rngs: nnx.Rngs,
    ):
        # Checked here, so that cuDNN where it cannot run is an error before anything is loaded.
        resolve_implementation(attn_impl, jnp.dtype(dtype), config.head_dim, packed=False)
        execution = Execution(dtype, param_dtype, attn_impl)
        self.config = config
        self.dtype = dtype
        self.attn_impl: AttentionImplementation = attn_impl
        self.gradient_checkpointing: GradientCheckpointing = check_policy(gradient_checkpointing)
        self.kept_layers = check_kept_layers(kept_layers, config.num_hidden_layers)
        self.document_layout: DocumentLayout | None = None
        self.kernels: Kernels = "auto"
        self.noise: EmbeddingNoise | None = nnx.data(None)
        self.model = Decoder(config, execution, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = make_linear(
                config.hidden_size, config.vocab_size, False, execution, rngs
            )

    def __getattr__(self, name: str) -> TiedHead:
        # Called for absent attributes only. A stored tied head would move the embedding's state to
        # the path lm_head.embed_tokens, because nnx visits attributes in alphabetical order.
        if name == "lm_head":
            return TiedHead(self.model.embed_tokens)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def parts(self) -> Parts:
        """Partitions of its parameters over a mesh."""
        return self.config.family.parts

    @property
    def tied_modules(self) -> dict[str, str]:
        """Names in checkpoints of modules that share another module's weight."""
        return {"lm_head": "model.embed_tokens"} if self.config.tie_word_embeddings else {}

    def __call__(
        self,
        input_ids: Int[Array, "b t"],
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> Float[Array, "b t v"]:
        """Returns the logits of the next token at every token, float32."""
        return self.logits(self.hidden_states(input_ids, positions, segment_ids))

    def logits(self, hidden: Float[Array, "*batch d"]) -> Float[Array, "*batch v"]:
        """Returns the head's output for some hidden states, float32."""
        return self.lm_head(hidden).astype(jnp.float32)

    @overload
    def hidden_states(
        self, input_ids, positions=None, segment_ids=None, cache: None = None, inputs_embeds=None
    ) -> Float[Array, "b t d"]: ...

    @overload
    def hidden_states(
        self, input_ids, positions=None, segment_ids=None, *, cache: KVCache
    ) -> tuple[Float[Array, "b t d"], KVCache]: ...

    def hidden_states(
        self,
        input_ids: Int[Array, "b t"],
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        cache: KVCache | None = None,
        inputs_embeds: Float[Array, "b t d"] | None = None,
    ):
        """Returns the states after the final norm, (b, t, d); with a cache, (states, new cache).

        Args:
            input_ids: Tokens; sequences are padded on the right.
            positions: Position of each token in its document; None counts from 0. Padding must
                not exceed its sequence's last position where the rotary scaling is ``dynamic``.
            segment_ids: Number of each token's document in its sequence, 0 for padding; None where
                every sequence is one document. If a sequence does not fit `document_layout` and
                cuDNN runs, it comes out as NaN.
            cache: From `init_cache`, or returned by an earlier call.
            inputs_embeds: The embedding's rows for the tokens, in the device's or the host's
                memory; the embedding itself is not read then.

        Raises:
            ValueError: If packed sequences come with a cache, a used cache without positions, or
                the tokens lie on a mesh with axes of the type Explicit.
        """
        refuse_explicit_axes(input_ids)
        if cache is not None and segment_ids is not None:
            raise ValueError("a cache holds one document per sequence: pass no segment_ids with it")
        if positions is None:
            if cache is not None and not cache.empty:
                raise ValueError("a used cache needs the positions of the new tokens")
            count = jnp.arange(input_ids.shape[1], dtype=jnp.int32)[None, :]
            positions = jnp.broadcast_to(count, input_ids.shape)
        if inputs_embeds is None:
            hidden = self.model.embed_tokens(input_ids)
        else:
            on_device = jax.device_put(inputs_embeds, jax.memory.Space.Device)
            hidden = on_device.astype(self.dtype)
        if self.noise is not None:
            hidden = self.noise(hidden)
        documents = None
        if segment_ids is not None:
            documents, hidden = self._find_documents(segment_ids, hidden)
        rotary = self._rotary(positions, segment_ids)
        context = Context(rotary, positions, documents)
        if cache is not None:
            return self._run_with_cache(hidden, context, cache)
        layers = list(self.model.layers)
        recomputation = Recomputation(self.gradient_checkpointing, self.kept_layers)
        from_host = inputs_embeds is not None
        hidden = run_layers(layers, hidden, context, recomputation, from_host=from_host)
        return self.model.norm(hidden)

    def _find_documents(self, segment_ids, hidden):
        impl = self.attn_impl
        head_dim = self.config.head_dim
        if resolve_implementation(impl, hidden.dtype, head_dim, packed=True) == "xla":
            return Documents(segment_ids), hidden
        layout = self.document_layout
        if layout is None:
            return Documents(segment_ids), hidden
        # An array cannot raise inside jit; sequences with wrong attention become NaN.
        wrong = too_many_documents(segment_ids, layout)[:, None, None]
        hidden = jnp.where(wrong, jnp.asarray(jnp.nan, hidden.dtype), hidden)
        return find_documents(segment_ids, layout), hidden

    def _rotary(self, positions, segment_ids) -> Rotary:
        c = self.config
        lengths = document_lengths(positions, segment_ids)
        return rotary_tables(c.rope, c.head_dim, c.max_position_embeddings, positions, lengths)

    def _run_with_cache(self, hidden, context: Context, cache: KVCache):
        layers = []
        for layer, stored in zip(self.model.layers, cache.layers, strict=True):
            hidden, stored = layer(hidden, context, stored, cache.empty)
            layers.append(stored)
        return self.model.norm(hidden), KVCache(tuple(layers), empty=False)

    def init_cache(self, batch: int, length: int, dtype: DTypeLike | None = None) -> KVCache:
        """Returns an empty cache for `batch` sequences of up to `length` tokens.

        Args:
            batch: Number of sequences.
            length: Slots; a token whose position is not below it is not stored.
            dtype: Dtype of keys and values; None is the model's.
        """
        config = self.config
        dtype = self.dtype if dtype is None else dtype
        shape = (batch, length, config.num_key_value_heads, config.head_dim)
        layers = [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in self.model.layers]
        return KVCache(tuple(layers), empty=True)


def init_model(
    config: DecoderConfig,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    seed: int = 0,
    attn_impl: AttentionImplementation = "auto",
    gradient_checkpointing: GradientCheckpointing = "none",
    kept_layers: int = 1,
) -> CausalLM:
    """Returns a model with fresh weights in `dtype`, for pretraining; see `CausalLM`."""
    return CausalLM(
        config,
        dtype=dtype,
        param_dtype=dtype,
        attn_impl=attn_impl,
        gradient_checkpointing=gradient_checkpointing,
        kept_layers=kept_layers,
        rngs=nnx.Rngs(seed),
    )
