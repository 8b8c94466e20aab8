"""A larger vocabulary: rows for new tokens in the embedding and the head."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lorax.devices.host_memory import HostArray
from lorax.layers.carrier import Carrier
from lorax.models.decoder import CausalLM
from lorax.system.arguments import check_kind


def resize_vocabulary(model: CausalLM, size: int, *, tokens: Sequence[int] = ()) -> CausalLM:
    """Returns `model` with room for more tokens; the others keep their values and ids.

    A new token's row of the embedding, and of a head of its own, is the mean of the rows that are
    there: its logit is then the mean of the others'. Train the rows with
    ``trainable_token_indices``. Save the model and its tokenizer: an adapter alone needs a base of
    this size.

    Args:
        model: A model without adapters.
        size: The new number of tokens.
        tokens: Ids of the new tokens. Many models have more rows than tokens: the rows of these
            are set too, and the mean is of the rows before the first of them.

    Raises:
        TypeError: If the model is no language model of lorax's.
        ValueError: If the vocabulary would shrink, the model carries adapters, or its embedding is
            in the host's memory.

    Source: Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html
    """
    check_kind("model", model, CausalLM, "a lorax.CausalLM, as of lorax.load_model")
    old = model.config.vocab_size
    if size < old:
        raise ValueError(f"size must be at least the model's {old} tokens, got {size}")
    if wrong := [token for token in tokens if not 0 < token < size]:
        raise ValueError(f"tokens must be ids of 1 to {size - 1}, got {wrong[0]}")
    resized = nnx.clone(model)
    table = resized.model.embed_tokens
    head = None if model.config.tie_word_embeddings else resized.lm_head
    for name, layer in (("model.embed_tokens", table), ("lm_head", head)):
        if isinstance(layer, Carrier) and layer.attached:
            raise ValueError(f"{name} carries an adapter: resize the base, then apply_lora")
    if isinstance(table.embedding.get_value(), HostArray):
        raise ValueError("the embedding is in the host's memory: load it without offload_embedding")
    table.embedding.set_value(_grown(table.embedding.get_value(), size, tokens))
    table.num_embeddings = size
    if head is not None:
        head.kernel.set_value(_grown(head.kernel.get_value().T, size, tokens).T)
        head.out_features = size
    resized.config = dataclasses.replace(model.config, vocab_size=size)
    return resized


def _grown(rows: Float[Array, "v d"], size: int, tokens: Sequence[int]) -> Float[Array, "w d"]:
    used = min((rows.shape[0], *tokens))
    mean = rows[:used].astype(jnp.float32).mean(0).astype(rows.dtype)
    more: Any = jnp.broadcast_to(mean, (size - rows.shape[0], rows.shape[1]))
    grown = jax.lax.concatenate([rows, more], 0)
    return grown.at[jnp.array(tokens)].set(mean) if tokens else grown
