"""Sampling of the next token, and the checks of its options."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

_LONGEST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The options of sampling the next token.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Keep only the k most likely tokens.
        top_p: Keep only the most likely tokens that together reach this probability.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None


def option_problems(
    *,
    max_new_tokens: int = 1,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> dict[str, str]:
    """Returns the problems of options of `generate`, by their names; empty if all is well."""
    found = {}
    if not 1 <= max_new_tokens <= _LONGEST:
        found["max_new_tokens"] = f"must be 1 to {_LONGEST}, got {max_new_tokens}"
    if not (np.isfinite(temperature) and temperature >= 0):
        found["temperature"] = f"must be 0 (greedy) or positive, got {temperature}"
    if top_k is not None and top_k < 1:
        found["top_k"] = f"must be at least 1, got {top_k}"
    if top_p is not None and not 0 < top_p <= 1:
        found["top_p"] = f"must be in (0, 1], got {top_p}"
    for name, value in (("top_k", top_k), ("top_p", top_p)):
        if temperature == 0 and value is not None:
            found.setdefault(name, "chooses among samples: set a temperature above 0")
    if not 0 <= seed < 2**32:
        found["seed"] = f"must be 0 to {2**32 - 1}, got {seed}"
    return found


def choose_tokens(
    logits: Float[Array, "b v"], key: Key[Array, ""], step: Int[Array, ""], sampling: Sampling
) -> Int[Array, " b"]:
    """Returns the next token of each sequence; a draw depends on key, step and index alone."""
    if sampling.temperature == 0:
        return logits.argmax(axis=-1).astype(jnp.int32)
    # From the most likely token down, which stays 0 however small the temperature: one below the
    # smallest float32 takes the most likely token, as its limit does.
    below = logits.astype(jnp.float32)
    below = below - below.max(axis=-1, keepdims=True)
    temperature = jnp.float32(min(sampling.temperature, float(jnp.finfo(jnp.float32).max)))
    logits = jnp.where(below == 0, 0.0, below / temperature)
    if sampling.top_k is not None:
        kept = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kept, -jnp.inf, logits)
    if sampling.top_p is not None:
        logits = jnp.where(_outside_nucleus(logits, sampling.top_p), -jnp.inf, logits)

    def row_key(row):
        return jax.random.fold_in(jax.random.fold_in(key, step), row)

    keys = jax.vmap(row_key)(jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _outside_nucleus(logits: Float[Array, "b v"], top_p: float):
    """Returns which tokens are not among the most likely that together reach `top_p`.

    Source: Holtzman et al. 2019, §3.1, https://arxiv.org/abs/1904.09751
    """
    order = jnp.argsort(-logits, axis=-1)
    probabilities = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    # A token is outside if those before it reach top_p already; so the first never is.
    outside = jnp.cumsum(probabilities, axis=-1) - probabilities >= top_p
    return jnp.take_along_axis(outside, jnp.argsort(order, axis=-1), axis=-1)
