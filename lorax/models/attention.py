"""Causal attention: XLA anywhere, cuDNN on NVIDIA GPUs, over whole rows or packed documents."""

import dataclasses
import functools
from typing import Literal, cast, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

type AttentionImplementation = Literal["auto", "xla", "cudnn"]
type LayerCache = tuple[Float[Array, "b s groups d"], Float[Array, "b s groups d"]]

DATA_AXIS = "data"
"""The mesh axis that rows are spread over, as in `lorax.devices.placement`."""

_TILE = 128


@dataclasses.dataclass(frozen=True)
class DocumentLayout:
    """What cuDNN must know of packed rows when it is compiled.

    It is told of windows instead of rows, because its workspace in the backward pass grows with
    tokens × documents per window: whole rows of many short documents took 60 GiB at 8,192 tokens.

    Attributes:
        window: Tokens of a window, at least as many as the longest document.
        documents: The most documents that begin in one window, counted from the row's start.
    """

    window: int
    documents: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Documents:
    """Which tokens belong together, and where cuDNN finds each run of them.

    Attributes:
        segment_ids: Number of each token's document in its row; 0 is padding.
        starts: First token of each run that begins in a window, counted from the window's own
            first token, -1 after the last; None where cuDNN, if it runs, is to be given a mask.
        lengths: Tokens of each run, which may end in a later window; -1 after the last.
    """

    segment_ids: Int[Array, "b t"]
    starts: Int[Array, "b windows runs"] | None = None
    lengths: Int[Array, "b windows runs"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of earlier tokens; slot p of a row holds its token at position p.

    Attributes:
        layers: (keys, values) per layer, rotated.
        empty: Nothing is stored yet. Static: the first call stores a whole prompt and attends
            within it, later ones add tokens at their positions.
    """

    layers: tuple[LayerCache, ...]
    empty: bool = dataclasses.field(metadata={"static": True})


def find_documents(segment_ids: Int[Array, "b t"], layout: DocumentLayout) -> Documents:
    """Returns `Documents` with the start and length of every run of equal ids.

    Padding is cut at every window, so that no run is longer than one.

    Args:
        segment_ids: Document of each token in its row.
        layout: Windows that hold more documents than it says give wrong runs: see
            `too_many_documents`. A window that does not divide the row becomes the whole row.
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
    # xla_gpu_exclude_nondeterministic_ops XLA 0.11.2 writes what is to be dropped elsewhere.)
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
    """Numbers the runs of equal ids of each row from 0."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(jnp.cumsum(changes, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def document_lengths(
    positions: Int[Array, "b t"], segment_ids: Int[Array, "b t"] | None
) -> Int[Array, "b #t"]:
    """Returns the last position of each token's document, plus one (per row if not packed)."""
    if segment_ids is None:
        return positions.max(axis=1, keepdims=True) + 1
    run = run_index(segment_ids)
    row = jnp.broadcast_to(jnp.arange(run.shape[0])[:, None], run.shape)
    last = jnp.zeros_like(positions).at[row, run].max(positions)
    return jnp.take_along_axis(last, run, axis=1) + 1


def too_many_documents(segment_ids: Int[Array, "b t"], layout: DocumentLayout) -> Bool[Array, " b"]:
    """Says which rows do not fit the layout: a window too full, or a document too long."""
    rows, length = segment_ids.shape
    window, runs = _window_and_runs(length, layout)
    starts = _run_starts(segment_ids, window).reshape(rows, -1, window)
    run = run_index(segment_ids)
    beyond = run[:, window:] == run[:, :-window]
    too_long = (beyond & (segment_ids[:, window:] != 0)).any(axis=1)
    return (starts.sum(axis=2) > runs).any(axis=1) | too_long


def cudnn_obstacle(dtype: jnp.dtype, head_dim: int, *, packed: bool) -> str | None:
    """Returns why cuDNN cannot run this attention here, or None if it can."""
    if jax.default_backend() != "gpu":
        return f"it needs an NVIDIA GPU, and JAX runs on {jax.default_backend()}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it needs bfloat16 or float16, got {jnp.dtype(dtype).name}"
    device = jax.local_devices(backend="gpu")[0]
    if "cuda" not in device.client.platform_version:
        return f"it needs an NVIDIA GPU, this is {device.device_kind}"
    capability = float(device.compute_capability)
    largest = 256 if capability >= 9 else 128
    if capability < 8:
        return f"it needs compute capability 8.0 or later, {device.device_kind} has {capability}"
    if head_dim % 8 or head_dim > largest:
        return f"it needs a head_dim divisible by 8 and at most {largest}, got {head_dim}"
    if packed and capability < 9:
        return f"packed rows need compute capability 9.0 (Hopper), this is {capability}"
    return None


def resolve_implementation(
    impl: AttentionImplementation, dtype: jnp.dtype, head_dim: int, *, packed: bool
) -> Literal["xla", "cudnn"]:
    """Returns what will run: "auto" is cuDNN wherever it can run, else XLA.

    Raises:
        ValueError: If `impl` is unknown, or "cudnn" where cuDNN cannot run.
    """
    if impl not in get_args(AttentionImplementation.__value__):
        raise ValueError(f"attn_impl must be auto, xla or cudnn, got {impl!r}")
    if impl == "xla":
        return "xla"
    obstacle = cudnn_obstacle(dtype, head_dim, packed=packed)
    if impl == "cudnn" and obstacle:
        raise ValueError(f"attn_impl='cudnn' cannot run here: {obstacle}; set it to auto or xla")
    return "xla" if obstacle else "cudnn"


def attend(
    q: Float[Array, "b t heads d"],
    k: Float[Array, "b t groups d"],
    v: Float[Array, "b t groups d"],
    *,
    documents: Documents | None = None,
    sliding_window: int | None = None,
    impl: AttentionImplementation = "auto",
) -> Float[Array, "b t heads d"]:
    """Returns ``softmax(q·kᵀ / √d + mask)·v``, causal, the softmax in float32.

    Token i sees token j if j ≤ i, both are of one document, and i - j < `sliding_window`. Padding
    on the right needs no mask of its own: no earlier token sees it.

    Packed rows on cuDNN are computed by document if the runs are known. If not, it is given a mask:
    that takes longer, and memory for t² elements of each row.

    Args:
        q: Queries.
        k: Keys; head h of `q` reads group h // (heads / groups).
        v: Values.
        documents: The documents of packed rows; None where every row is one document.
        sliding_window: Tokens that each token sees, itself included.
        impl: What runs; see `resolve_implementation`. XLA writes all (t, t) scores to memory.

    Raises:
        ValueError: If cuDNN is asked for and cannot run.
    """
    runs = resolve_implementation(impl, q.dtype, q.shape[-1], packed=documents is not None)
    if runs == "xla":
        mask = _visible(q.shape[1], documents, sliding_window)
        return _attend_masked(q, k, v, mask)
    if documents is not None and documents.starts is not None and documents.lengths is not None:
        by_document = functools.partial(_attend_windows, sliding_window=sliding_window)
        return _by_row(by_document, q, k, v, documents.starts, documents.lengths)
    window = None if sliding_window is None else (sliding_window - 1, 0)
    plain = functools.partial(
        jax.nn.dot_product_attention,
        is_causal=True,
        local_window_size=window,
        implementation="cudnn",
    )
    if documents is None:
        return plain(q, k, v)
    return _by_row(functools.partial(_attend_by_mask, plain), q, k, v, documents.segment_ids)


def attend_cache(
    q: Float[Array, "b t heads d"],
    keys: Float[Array, "b s groups d"],
    values: Float[Array, "b s groups d"],
    positions: Int[Array, "b t"],
    *,
    sliding_window: int | None = None,
) -> Float[Array, "b t heads d"]:
    """Attends from a few new tokens to a cache whose slot is the position; always in XLA.

    Args:
        q: Queries of the new tokens.
        keys: The cache; slots above a row's positions may hold anything.
        values: The cache.
        positions: Position, and so cache slot, of each new token.
        sliding_window: Tokens that each token sees, itself included.
    """
    slots = jnp.arange(keys.shape[1])[None, None, :]
    visible = slots <= positions[:, :, None]
    if sliding_window is not None:
        visible &= positions[:, :, None] - slots < sliding_window
    return _attend_masked(q, keys, values, visible[:, None, None])


def _attend_masked(
    q: Float[Array, "b t heads d"],
    k: Float[Array, "b s groups d"],
    v: Float[Array, "b s groups d"],
    visible: Bool[Array, "#b 1 1 t s"],
) -> Float[Array, "b t heads d"]:
    # jax.nn.dot_product_attention(implementation="xla") rejects bfloat16 under strict promotion.
    rows, length, heads, head_dim = q.shape
    grouped = q.reshape(rows, length, k.shape[2], heads // k.shape[2], head_dim)
    scores = jnp.einsum("btgrd,bsgd->bgrts", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(visible, scores * head_dim**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bgrts,bsgd->btgrd", weights, v).reshape(q.shape)


def store(
    cache: LayerCache,
    k: Float[Array, "b t groups d"],
    v: Float[Array, "b t groups d"],
    positions: Int[Array, "b t"],
    *,
    empty: bool,
) -> LayerCache:
    """Returns the cache with new keys and values in it.

    Args:
        cache: One layer's keys and values.
        k: Keys of the new tokens.
        v: Values of the new tokens.
        positions: Their slots, unless `empty`.
        empty: Token i of every row goes to slot i: a whole prompt.
    """
    if empty:
        put = lambda whole, new: jax.lax.dynamic_update_slice(
            whole, new.astype(whole.dtype), (0, 0, 0, 0)
        )
    else:
        row = jnp.broadcast_to(jnp.arange(positions.shape[0])[:, None], positions.shape)
        put = lambda whole, new: whole.at[row, positions].set(new.astype(whole.dtype), mode="drop")
    return put(cache[0], k), put(cache[1], v)


def _visible(
    length: int, documents: Documents | None, sliding_window: int | None
) -> Bool[Array, "rows 1 1 t t"]:
    distance = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    visible = distance >= 0
    if sliding_window is not None:
        visible &= distance < sliding_window
    visible = visible[None, None, None]
    if documents is not None:
        run = run_index(documents.segment_ids)
        visible = visible & (run[:, None, None, :, None] == run[:, None, None, None, :])
    return visible


def _by_row(attend_rows, *arrays) -> jax.Array:
    """Runs cuDNN over each device's own rows."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.shape.get(DATA_AXIS, 1) > 1 and DATA_AXIS not in mesh.manual_axes:
        rows = PartitionSpec(DATA_AXIS)
        specs = (rows,) * len(arrays)
        attend_rows = jax.shard_map(
            attend_rows, in_specs=specs, out_specs=rows, axis_names={DATA_AXIS}
        )
    return attend_rows(*arrays)


def _attend_by_mask(attend_plain, q, k, v, segment_ids):
    """Keeps documents apart by a mask, in rows of whole tiles: others are known to give NaN."""
    length = q.shape[1]
    q, k, v, segment_ids = (
        jnp.pad(x, ((0, 0), (0, -length % _TILE), *[(0, 0)] * (x.ndim - 2)))
        for x in (q, k, v, segment_ids)
    )
    run = run_index(segment_ids)
    mask = (run[:, :, None] == run[:, None, :])[:, None]
    return attend_plain(q, k, v, mask=mask)[:, :length]


def _attend_windows(q, k, v, starts, lengths, *, sliding_window):
    """Hands over windows as rows; a document may reach into the next, all being one stretch."""
    rows, windows, runs = starts.shape
    cut = lambda x: x.reshape(rows * windows, -1, *x.shape[2:])
    starts, lengths = starts.reshape(-1, runs), lengths.reshape(-1, runs)
    # jax 0.11.2 counts an end that is also the next row's start twice, which gives NaN: only the
    # last row says where it ends.
    ends = jnp.full((rows * windows, 1), -1, starts.dtype).at[-1].set(q.shape[1] // windows)
    offsets = jnp.concatenate([starts, ends], axis=1)
    attended = _packed_kernel(
        cut(q), cut(k), cut(v), lengths, offsets, sliding_window=sliding_window
    )
    return attended.reshape(q.shape)


def _packed_kernel(q, k, v, lengths, offsets, *, sliding_window) -> jax.Array:
    """Calls jax's private binding of cuDNN's packed layout; nothing public reaches it."""
    # Imported here, since the module is private: only who packs on a GPU depends on it.
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
