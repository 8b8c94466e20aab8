"""Generation from a model: prefill once, then one compiled loop over a key-value cache."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from lorax.interop.checkpoint import CONFIG_FILE, GENERATION_FILE
from lorax.interop.files import read_json
from lorax.models import CausalLM

_UNUSED = -1  # marks slots of the output that no token was written to


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Keep only the k most likely tokens.
        top_p: Keep only the most likely tokens that together reach this probability.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not (np.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ValueError("top_k and top_p choose among samples: set a temperature above 0")


def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Iterable[int],
    pad_id: int = 0,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Continues every prompt until a stop token or `max_new_tokens`.

    The prompts run as one batch, padded on the right; a row does not depend on the others (when
    sampling, its draws depend on its index). Widths are rounded up, so that few programs are
    compiled; they are kept for later calls.

    Args:
        model: The model, with or without adapters; put it in evaluation mode first if it has
            dropout.
        prompts: Token ids, none empty.
        max_new_tokens: The most tokens added to a prompt.
        stop_ids: Tokens that end a row; see `stop_token_ids`. May be empty.
        pad_id: Any id of the vocabulary; what stands there does not matter.
        temperature: See `Sampling`.
        top_k: See `Sampling`.
        top_p: See `Sampling`.
        seed: Decides the draws.

    Returns:
        The new tokens of each prompt, without the stop token.

    Raises:
        ValueError: If a prompt is empty or an id is outside the vocabulary, or a sampling option
            is out of range.
    """
    sampling = Sampling(temperature, top_k, top_p)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not prompts:
        return []
    ids, lengths = _pad(prompts, pad_id, model.config.vocab_size)
    graph, state = nnx.split(model)
    stops = sorted({int(i) for i in stop_ids}) or [_UNUSED]
    arrays = [jnp.asarray(x, jnp.int32) for x in (ids, lengths, stops, max_new_tokens)]
    capacity = _round_up(max_new_tokens, 32)
    key = jax.random.key(seed)
    output = _run(graph, state, *arrays, key, capacity=capacity, sampling=sampling)
    return [_until(row, [*stops, _UNUSED]) for row in np.asarray(output).tolist()]


def stop_token_ids(directory: str | Path, tokenizer: Any = None) -> tuple[int, ...]:
    """Returns every token that ends a text, as a checkpoint's files name them.

    Collects ``eos_token_id`` of generation_config.json, of config.json and of the tokenizer: chat
    models end a turn with one and a text with another.

    Args:
        directory: Folder of the checkpoint.
        tokenizer: Anything with ``eos_token_id``, or None.

    Raises:
        ValueError: If none of them names one.
    """
    found: set[int] = set()
    for name in (GENERATION_FILE, CONFIG_FILE):
        path = Path(directory) / name
        value = read_json(path).get("eos_token_id") if path.exists() else None
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    if getattr(tokenizer, "eos_token_id", None) is not None:
        found.add(tokenizer.eos_token_id)
    if not found:
        raise ValueError(
            f"{directory}: neither {GENERATION_FILE}, {CONFIG_FILE} nor the tokenizer has an "
            f"eos_token_id; add one to {GENERATION_FILE} (from Python: pass stop_ids)"
        )
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in found):
        raise ValueError(
            f"{directory}: eos_token_id must be token ids, got {sorted(map(str, found))}"
        )
    return tuple(sorted(found))


def _pad(
    prompts: Sequence[Sequence[int]], pad_id: int, vocabulary: int
) -> tuple[np.ndarray, np.ndarray]:
    for name, row in [("pad_id", [pad_id]), *((f"prompts[{i}]", p) for i, p in enumerate(prompts))]:
        if not len(row):
            raise ValueError(f"{name} is empty; give it at least one token, such as the bos token")
        wrong = [i for i in row if not 0 <= i < vocabulary]
        if wrong:
            raise ValueError(f"{name} holds {wrong[0]}, outside the vocabulary [0, {vocabulary})")
    lengths = np.array([len(p) for p in prompts], np.int32)
    ids = np.full((len(prompts), _round_up(int(lengths.max()), 64)), pad_id, np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return ids, lengths


def _round_up(count: int, step: int) -> int:
    """Returns the smallest ``step · 2^i`` that holds `count`."""
    while step < count:
        step *= 2
    return step


def _until(row: list[int], ends: list[int]) -> list[int]:
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]


@functools.partial(jax.jit, static_argnames=("graph", "capacity", "sampling"))
def _run(
    graph: nnx.GraphDef,
    state: nnx.State,
    ids: Int[Array, "b t"],
    lengths: Int[Array, " b"],
    stops: Int[Array, " n"],
    limit: Int[Array, ""],
    key: Key[Array, ""],
    *,
    capacity: int,
    sampling: Sampling,
) -> Int[Array, "b capacity"]:
    """Returns the new tokens of each row, stop tokens included, and -1 where there are none."""
    model: CausalLM = nnx.merge(graph, state)
    rows, width = ids.shape
    # Padding repeats the last position: some rotary scalings read the row's largest one.
    positions = jnp.minimum(jnp.arange(width, dtype=jnp.int32)[None, :], lengths[:, None] - 1)
    cache = model.init_cache(rows, width + capacity)
    hidden, cache = model.hidden_states(ids, positions, cache=cache)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    token = _choose(model.logits(last), key, jnp.zeros((), jnp.int32), sampling)
    output = jnp.full((rows, capacity), _UNUSED, jnp.int32).at[:, 0].set(token)

    def running(carry):
        step, _, done, _, _ = carry
        return (step < limit) & ~done.all()

    def advance(carry):
        step, token, done, cache, output = carry
        at = (lengths + step - 1)[:, None]
        hidden, cache = model.hidden_states(token[:, None], at, cache=cache)
        token = _choose(model.logits(hidden[:, 0]), key, step, sampling)
        output = output.at[:, step].set(jnp.where(done, _UNUSED, token))
        return step + 1, token, done | _is_stop(token, stops), cache, output

    start = (jnp.ones((), jnp.int32), token, _is_stop(token, stops), cache, output)
    return jax.lax.while_loop(running, advance, start)[-1]


def _is_stop(token: Int[Array, " b"], stops: Int[Array, " n"]):
    return (token[:, None] == stops[None, :]).any(axis=1)


def _choose(
    logits: Float[Array, "b v"], key: Key[Array, ""], step: Int[Array, ""], sampling: Sampling
) -> Int[Array, " b"]:
    if sampling.temperature == 0:
        return logits.argmax(axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        kept = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kept, -jnp.inf, logits)
    if sampling.top_p is not None:
        logits = jnp.where(_outside_nucleus(logits, sampling.top_p), -jnp.inf, logits)
    row_key = lambda row: jax.random.fold_in(jax.random.fold_in(key, step), row)
    keys = jax.vmap(row_key)(jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _outside_nucleus(logits: Float[Array, "b v"], top_p: float):
    """Says which tokens are not among the most likely that together reach `top_p`.

    Source: Holtzman et al. 2019, §3.1, https://arxiv.org/abs/1904.09751
    """
    order = jnp.argsort(-logits, axis=-1)
    probabilities = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    # A token is outside if those before it reach top_p already; so the first never is.
    outside = jnp.cumsum(probabilities, axis=-1) - probabilities >= top_p
    return jnp.take_along_axis(outside, jnp.argsort(order, axis=-1), axis=-1)
