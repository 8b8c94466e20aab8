"""Generation from a model: prefill once, then one compiled loop over a key-value cache."""

import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, Key

from lorax.generation.sampling import Sampling, choose_tokens, option_problems
from lorax.models.decoder import CausalLM

_UNUSED = -1  # marks slots of the output without a token


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

    The prompts run as one batch, padded on the right. A sequence does not depend on the others
    (when sampling, its draws depend on its index). Widths are rounded up, so that few programs are
    compiled; they are kept for later calls.

    Args:
        model: The model, with or without adapters; put it in evaluation mode first if it has
            dropout.
        prompts: Token ids, none empty.
        max_new_tokens: The most tokens added to a prompt.
        stop_ids: Tokens that end a sequence; see `lorax.interop.stop_tokens`. May be empty.
        pad_id: Any id of the vocabulary; its value does not matter.
        temperature: See `Sampling`.
        top_k: See `Sampling`.
        top_p: See `Sampling`.
        seed: Seed of the draws.

    Returns:
        The new tokens of each prompt, without the stop token.

    Raises:
        ValueError: If a prompt is empty or an id is outside the vocabulary, or options are out of
            range; see `option_problems`.
    """
    wrong = option_problems(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    if wrong:
        raise ValueError("; ".join(f"{name} {text}" for name, text in wrong.items()))
    sampling = Sampling(temperature, top_k, top_p)
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
    """Returns the new tokens of each sequence, with stop tokens, and -1 where there are none."""
    model: CausalLM = nnx.merge(graph, state)
    rows, width = ids.shape
    # Padding repeats the last position: some rotary scalings read a sequence's largest one.
    positions = jnp.minimum(jnp.arange(width, dtype=jnp.int32)[None, :], lengths[:, None] - 1)
    cache = model.init_cache(rows, width + capacity)
    hidden, cache = model.hidden_states(ids, positions, cache=cache)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    token = choose_tokens(model.logits(last), key, jnp.zeros((), jnp.int32), sampling)
    output = jnp.full((rows, capacity), _UNUSED, jnp.int32).at[:, 0].set(token)

    def running(carry):
        step, _, done, _, _ = carry
        return (step < limit) & ~done.all()

    def advance(carry):
        step, token, done, cache, output = carry
        at = (lengths + step - 1)[:, None]
        hidden, cache = model.hidden_states(token[:, None], at, cache=cache)
        token = choose_tokens(model.logits(hidden[:, 0]), key, step, sampling)
        output = output.at[:, step].set(jnp.where(done, _UNUSED, token))
        return step + 1, token, done | _is_stop(token, stops), cache, output

    start = (jnp.ones((), jnp.int32), token, _is_stop(token, stops), cache, output)
    return jax.lax.while_loop(running, advance, start)[-1]


def _is_stop(token: Int[Array, " b"], stops: Int[Array, " n"]):
    return (token[:, None] == stops[None, :]).any(axis=1)
