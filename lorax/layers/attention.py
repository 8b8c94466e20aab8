"""Causal attention over sequences, packed documents or a cache: XLA or cuDNN."""

import dataclasses
import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from lorax.devices.mesh import DATA_AXIS
from lorax.layers.documents import Documents, attend_by_mask, attend_windows, run_index

type AttentionImplementation = Literal["auto", "xla", "cudnn"]
type LayerCache = tuple[Float[Array, "b s groups d"], Float[Array, "b s groups d"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of earlier tokens; slot p of a sequence holds its token at position p.

    Attributes:
        layers: (keys, values) per layer, rotated.
        empty: Nothing is stored yet. Static: the first call stores a whole prompt and attends
            within it, later ones add tokens at their positions.
    """

    layers: tuple[LayerCache, ...]
    empty: bool = dataclasses.field(metadata={"static": True})


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
    """Returns the implementation that will run: "auto" is cuDNN wherever it can run, else XLA.

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

    cuDNN computes packed sequences by document if the runs are known. If not, it gets a mask, which
    takes longer, and memory for t² elements per sequence.

    Args:
        q: Queries.
        k: Keys; head h of `q` reads group h // (heads / groups).
        v: Values.
        documents: The documents of packed sequences; None where every sequence is one document.
        sliding_window: Tokens that each token sees, itself included.
        impl: See `resolve_implementation`. XLA writes all (t, t) scores to memory.

    Raises:
        ValueError: If cuDNN is asked for and cannot run.
    """
    runs = resolve_implementation(impl, q.dtype, q.shape[-1], packed=documents is not None)
    if runs == "xla":
        mask = _visible(q.shape[1], documents, sliding_window)
        return _attend_masked(q, k, v, mask)
    if documents is not None and documents.starts is not None and documents.lengths is not None:
        by_document = functools.partial(attend_windows, sliding_window=sliding_window)
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
    return _by_row(functools.partial(attend_by_mask, plain), q, k, v, documents.segment_ids)


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
        keys: The cache; slots above a sequence's positions may hold anything.
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
        empty: Token i of every sequence goes to slot i: a whole prompt.
    """

    def put(whole, new):
        new = new.astype(whole.dtype)
        if empty:
            return jax.lax.dynamic_update_slice(whole, new, (0, 0, 0, 0))
        row = jnp.broadcast_to(jnp.arange(positions.shape[0])[:, None], positions.shape)
        return whole.at[row, positions].set(new, mode="drop")

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
    """Runs cuDNN over each device's own sequences."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.shape.get(DATA_AXIS, 1) > 1 and DATA_AXIS not in mesh.manual_axes:
        rows = PartitionSpec(DATA_AXIS)
        specs = (rows,) * len(arrays)
        attend_rows = jax.shard_map(
            attend_rows, in_specs=specs, out_specs=rows, axis_names={DATA_AXIS}
        )
    return attend_rows(*arrays)


type Rotary = tuple[Float[Array, "b t half"], Float[Array, "b t half"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Inputs shared by all layers.

    Attributes:
        rotary: cos and sin of each token.
        positions: Position of each token in its document.
        documents: Documents of packed sequences, or None.
        repeated: Whether the backward pass recomputes the layer.
    """

    rotary: Rotary
    positions: Int[Array, "b t"]
    documents: Documents | None
    repeated: bool = dataclasses.field(default=False, metadata={"static": True})
