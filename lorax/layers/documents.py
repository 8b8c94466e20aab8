"""Packed documents: their runs in a sequence as cuDNN needs them, and attention within them."""

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

_TILE = 128


@dataclasses.dataclass(frozen=True)
class DocumentLayout:
    """The shape of packed sequences, as cuDNN needs it when a program is compiled.

    cuDNN gets windows instead of sequences, because its workspace in the backward pass grows with
    tokens × documents per window: whole sequences of many short documents took 60 GiB at 8,192
    tokens.

    Attributes:
        window: Tokens of a window, at least as many as the longest document.
        documents: The most documents that begin in one window, counted from the sequence's start.
    """

    window: int
    documents: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Documents:
    """The documents of packed sequences, and the runs of their tokens for cuDNN.

    Attributes:
        segment_ids: Number of each token's document in its sequence; 0 is padding.
        starts: First token of each run that begins in a window, counted from the window's own
            first token, -1 after the last; None where cuDNN, if it runs, gets a mask.
        lengths: Tokens of each run, which may end in a later window; -1 after the last.
    """

    segment_ids: Int[Array, "b t"]
    starts: Int[Array, "b windows runs"] | None = None
    lengths: Int[Array, "b windows runs"] | None = None


def find_documents(segment_ids: Int[Array, "b t"], layout: DocumentLayout) -> Documents:
    """Returns `Documents` with the start and length of every run of equal ids.

    Padding is cut at every window, so that no run is longer than one.

    Args:
        segment_ids: Document of each token in its sequence.
        layout: Windows with more documents than its number give wrong runs: see
            `too_many_documents`. A window that does not divide the sequence becomes the sequence.
    """
    rows, length = segment_ids.shape
    window, runs = _window_and_runs(length, layout)
    is_start = _run_starts(segment_ids, window)
    token = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None, :], (rows, length))
    upcoming = jax.lax.cummin(jnp.where(is_start, token, length), axis=1, reverse=True)
    following = jnp.pad(upcoming[:, 1:], ((0, 0), (0, 1)), constant_values=length)
    shape = (rows * (length // window), window)
    starting = jnp.cumsum(is_start.reshape(shape), axis=1)
    # Before the start of run i lie the tokens that count at most i starts. (No scatter: with
    # xla_gpu_exclude_nondeterministic_ops XLA 0.11.2 writes elements to drop to wrong places.)
    before = starting[:, None, :] <= jnp.arange(runs)[None, :, None]
    starts = before.sum(axis=2, dtype=jnp.int32)
    left = (following - token).reshape(shape)
    lengths = jnp.take_along_axis(left, jnp.minimum(starts, window - 1), axis=1)
    starts, lengths = (jnp.where(starts < window, x, -1) for x in (starts, lengths))
    by_row = (rows, length // window, runs)
    return Documents(segment_ids, starts.reshape(by_row), lengths.reshape(by_row))


def _window_and_runs(length: int, layout: DocumentLayout) -> tuple[int, int]:
    if length % layout.window == 0:
        return layout.window, layout.documents + 1  # one for padding
    return length, layout.documents * -(-length // layout.window) + 1


def _run_starts(segment_ids: Int[Array, "b t"], window: int) -> Bool[Array, "b t"]:
    run = run_index(segment_ids)
    changed = jnp.diff(run, axis=1, prepend=jnp.full((run.shape[0], 1), -1, run.dtype)) != 0
    at_window = (jnp.arange(run.shape[1]) % window == 0)[None, :]
    return changed | (at_window & (segment_ids == 0))


def run_index(segment_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Numbers the runs of equal ids of each sequence from 0."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(jnp.cumsum(changes, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def document_lengths(
    positions: Int[Array, "b t"], segment_ids: Int[Array, "b t"] | None
) -> Int[Array, "b #t"]:
    """Returns the last position of each token's document, plus one (per sequence if not packed)."""
    if segment_ids is None:
        return positions.max(axis=1, keepdims=True) + 1
    run = run_index(segment_ids)
    row = jnp.broadcast_to(jnp.arange(run.shape[0])[:, None], run.shape)
    last = jnp.zeros_like(positions).at[row, run].max(positions)
    return jnp.take_along_axis(last, run, axis=1) + 1


def too_many_documents(segment_ids: Int[Array, "b t"], layout: DocumentLayout) -> Bool[Array, " b"]:
    """Returns which sequences do not fit the layout: a window too full, or a document too long."""
    rows, length = segment_ids.shape
    window, runs = _window_and_runs(length, layout)
    starts = _run_starts(segment_ids, window).reshape(rows, -1, window)
    run = run_index(segment_ids)
    beyond = run[:, window:] == run[:, :-window]
    too_long = (beyond & (segment_ids[:, window:] != 0)).any(axis=1)
    return (starts.sum(axis=2) > runs).any(axis=1) | too_long


def attend_by_mask(attend_plain, q, k, v, segment_ids):
    """Separates documents by a mask, in sequences of whole tiles: others are known to give NaN."""
    length = q.shape[1]
    q, k, v, segment_ids = (
        jnp.pad(x, ((0, 0), (0, -length % _TILE), *[(0, 0)] * (x.ndim - 2)))
        for x in (q, k, v, segment_ids)
    )
    run = run_index(segment_ids)
    mask = (run[:, :, None] == run[:, None, :])[:, None]
    return attend_plain(q, k, v, mask=mask)[:, :length]


def attend_windows(q, k, v, starts, lengths, *, sliding_window):
    """Calls cuDNN with windows as sequences; a document may reach into the next window."""
    rows, windows, runs = starts.shape

    def cut(x):
        return x.reshape(rows * windows, -1, *x.shape[2:])

    starts = starts.reshape(-1, runs)
    lengths = lengths.reshape(-1, runs)
    # jax 0.11.2 counts an end that is also the next sequence's start twice, which gives NaN: only
    # the last sequence has an end.
    ends = jnp.full((rows * windows, 1), -1, starts.dtype).at[-1].set(q.shape[1] // windows)
    offsets = jnp.concatenate([starts, ends], axis=1)
    attended = _packed_kernel(
        cut(q), cut(k), cut(v), lengths, offsets, sliding_window=sliding_window
    )
    return attended.reshape(q.shape)


def _packed_kernel(q, k, v, lengths, offsets, *, sliding_window) -> jax.Array:
    """Calls jax's private binding of cuDNN's packed layout; nothing public reaches it."""
    # Imported here, since the module is private: only packing on a GPU depends on it.
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    output = cudnn.dot_product_attention(
        q,
        k,
        v,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=q.shape[-1] ** -0.5,
        mask_type=cudnn.MaskType.PADDING_CAUSAL,
        sliding_window_length=sliding_window,
    )
    return cast(jax.Array, output)
