"""Attention: documents are found and kept apart, and cuDNN gets rows the way it needs them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lorax.layers import attention
from lorax.layers import documents as layers_documents
from lorax.layers.attention import attend, resolve_implementation
from lorax.layers.documents import (
    DocumentLayout,
    Documents,
    document_lengths,
    find_documents,
    too_many_documents,
)
from tests.bounds import distance, rounding

SEGMENTS = np.array(
    [[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1, 1], [1, 2, 3, 3, 3, 0, 0, 0]], np.int32
)

ROUNDING = rounding(8, condition=10)
"""Of 8 products in a score; a score of 10 with an error of u has a weight with one of 10 u."""


def reference(q, k, v, segment_ids=None, sliding_window=None):
    """Returns causal attention in float64, one query at a time."""
    rows, length, heads, head_dim = q.shape
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
    out = np.zeros_like(q)
    for row in range(rows):
        for i in range(length):
            seen = [
                j
                for j in range(i + 1)
                if (segment_ids is None or segment_ids[row, i] == segment_ids[row, j])
                and (sliding_window is None or i - j < sliding_window)
            ]
            for head in range(heads):
                scores = k[row, seen, head] @ q[row, i, head] / np.sqrt(head_dim)
                weights = np.exp(scores - scores.max())
                out[row, i, head] = weights / weights.sum() @ v[row, seen, head]
    return out


def draw(rows=3, length=8, heads=4, groups=2, head_dim=8, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shape = lambda n: (rows, length, n, head_dim)
    return [
        jax.random.normal(key, shape(n), dtype)
        for key, n in zip(keys, (heads, groups, groups), strict=True)
    ]


@pytest.mark.parametrize("sliding_window", [None, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_equals_its_definition(packed, sliding_window):
    q, k, v = draw()
    documents = Documents(jnp.asarray(SEGMENTS)) if packed else None
    found = attend(q, k, v, documents=documents, sliding_window=sliding_window)
    expected = reference(q, k, v, SEGMENTS if packed else None, sliding_window)
    assert distance(found, expected) <= ROUNDING


def test_bfloat16_gradients_flow():
    q, k, v = draw(dtype=jnp.bfloat16)
    gradients = jax.grad(lambda *x: attend(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))(
        q, k, v
    )
    assert all(g.dtype == jnp.bfloat16 and jnp.isfinite(g).all() for g in gradients)


def test_runs_of_documents_and_padding():
    found = find_documents(jnp.asarray(SEGMENTS), DocumentLayout(8, 3))
    np.testing.assert_array_equal(
        found.starts, [[[0, 3, 7, -1]], [[0, -1, -1, -1]], [[0, 1, 2, 5]]]
    )
    np.testing.assert_array_equal(
        found.lengths, [[[3, 4, 1, -1]], [[8, -1, -1, -1]], [[1, 1, 3, 3]]]
    )


def test_runs_are_found_without_a_scatter():
    # XLA compiles one that drops something wrongly where it leaves out what does not repeat.
    segments, layout = jnp.asarray(SEGMENTS), DocumentLayout(8, 3)
    text = str(jax.make_jaxpr(lambda s: find_documents(s, layout))(segments))
    assert "cumsum" in text and "scatter" not in text


def test_runs_are_counted_from_their_window_and_padding_is_cut_there():
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 3, 0], [1, 1, 0, 0, 0, 0, 0, 0]])
    found = find_documents(segments, DocumentLayout(4, 2))
    np.testing.assert_array_equal(found.starts[0], [[0, 3, -1], [2, 3, -1]])
    np.testing.assert_array_equal(found.lengths[0], [[3, 3, -1], [1, 1, -1]])
    np.testing.assert_array_equal(found.starts[1], [[0, 2, -1], [0, -1, -1]])
    np.testing.assert_array_equal(found.lengths[1], [[2, 2, -1], [4, -1, -1]])


def test_rows_that_do_not_fit_the_layout_are_told():
    segments = jnp.asarray(SEGMENTS)
    assert too_many_documents(segments, DocumentLayout(8, 3)).tolist() == [False, False, False]
    assert too_many_documents(segments, DocumentLayout(8, 2)).tolist() == [False, False, True]
    assert too_many_documents(segments, DocumentLayout(4, 3)).tolist() == [False, True, False]


def test_lengths_of_documents():
    positions = jnp.asarray([[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 5, 6, 7]])
    packed = document_lengths(positions, jnp.asarray(SEGMENTS[:2]))
    np.testing.assert_array_equal(packed, [[3, 3, 3, 4, 4, 4, 4, 1], [8] * 8])
    np.testing.assert_array_equal(document_lengths(positions, None), [[4], [8]])


def masked_kernel(q, k, v, lengths, offsets, *, sliding_window):
    """Stands in for cuDNN: reads lengths and offsets as jax documents them."""
    rows, width = q.shape[:2]
    assert lengths.shape == (rows, offsets.shape[1] - 1)
    base = width * jnp.arange(rows)[:, None]
    starts = jnp.where(offsets[:, :-1] < 0, -1, offsets[:, :-1] + base).reshape(1, -1)
    lengths = lengths.reshape(1, -1)
    token = jnp.arange(rows * width)[:, None]
    inside = (token >= starts) & (token < starts + lengths) & (starts >= 0)
    # Every token is in exactly one document.
    number = jnp.where(inside.sum(axis=1) == 1, inside.argmax(axis=1), -1 - token[:, 0])
    flat = [x.reshape(1, rows * width, *x.shape[2:]) for x in (q, k, v)]
    documents = Documents(number[None].astype(jnp.int32))
    out = attend(*flat, documents=documents, sliding_window=sliding_window, impl="xla")
    return out.reshape(q.shape)


@pytest.mark.parametrize("devices", [0, 1, 4])
@pytest.mark.parametrize("sliding_window", [None, 3])
@pytest.mark.parametrize("window", [4, 8])
def test_packed_rows_are_handed_to_cudnn_in_windows_by_device(
    window, devices, sliding_window, monkeypatch
):
    kernels = []

    def kernel(q, *rest, **options):
        kernels.append(q.shape)
        return masked_kernel(q, *rest, **options)

    monkeypatch.setattr(layers_documents, "_packed_kernel", kernel)
    monkeypatch.setattr(attention, "cudnn_obstacle", lambda *a, **k: None)
    segments = np.concatenate([SEGMENTS, SEGMENTS[::-1], SEGMENTS[:2]])
    q, k, v = draw(rows=8)

    @jax.jit
    def run(q, k, v, segments):
        documents = find_documents(segments, DocumentLayout(window, 3))
        impl = "xla" if documents.starts is None else "cudnn"
        # The stand-in calls attend again, with impl="xla".
        return attend(q, k, v, documents=documents, sliding_window=sliding_window, impl=impl)

    arguments = (q, k, v, jnp.asarray(segments))
    if devices:
        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",), axis_types=(AxisType.Auto,))
        arguments = jax.device_put(arguments, NamedSharding(mesh, PartitionSpec("data")))
        with jax.set_mesh(mesh):
            found = run(*arguments)
    else:
        found = run(*arguments)
    assert kernels == [(8 // max(devices, 1) * 8 // window, window, 4, 8)]
    assert distance(found, reference(q, k, v, segments, sliding_window)) <= ROUNDING


@pytest.mark.parametrize("devices", [0, 4])
@pytest.mark.parametrize("sliding_window", [None, 3])
def test_packed_rows_without_runs_are_handed_to_cudnn_with_a_mask(
    devices, sliding_window, monkeypatch
):
    shapes, plain = [], jax.nn.dot_product_attention

    def kernel(q, k, v, *, implementation, **options):
        assert implementation == "cudnn"
        shapes.append(q.shape)
        return plain(q, k, v, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    monkeypatch.setattr(attention, "cudnn_obstacle", lambda *a, **k: None)
    segments = np.concatenate([SEGMENTS, SEGMENTS[::-1], SEGMENTS[:2]])
    q, k, v = draw(rows=8)

    @jax.jit
    def run(q, k, v, segments):
        return attend(q, k, v, documents=Documents(segments), sliding_window=sliding_window)

    arguments = (q, k, v, jnp.asarray(segments))
    if devices:
        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",), axis_types=(AxisType.Auto,))
        arguments = jax.device_put(arguments, NamedSharding(mesh, PartitionSpec("data")))
        with jax.set_mesh(mesh):
            found = run(*arguments)
    else:
        found = run(*arguments)
    assert shapes == [(8 // max(devices, 1), 128, 4, 8)]
    assert distance(found, reference(q, k, v, segments, sliding_window)) <= ROUNDING


def on_gpu(monkeypatch, capability):
    class Client:
        platform_version = "cuda 13"

    class Device:
        client, device_kind, compute_capability = Client(), "a GPU", capability

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda backend: [Device()])


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "packed", "reason"),
    [
        (None, jnp.bfloat16, 64, False, "it needs an NVIDIA GPU, and JAX runs on cpu"),
        ("9.0", jnp.float32, 64, False, "it needs bfloat16 or float16, got float32"),
        ("9.0", jnp.bfloat16, 12, False, "a head_dim divisible by 8 and at most 256, got 12"),
        ("8.0", jnp.bfloat16, 256, False, "a head_dim divisible by 8 and at most 128, got 256"),
        ("7.5", jnp.float16, 64, False, "it needs compute capability 8.0 or later"),
        ("8.9", jnp.bfloat16, 64, True, r"packed rows need compute capability 9.0 \(Hopper\)"),
    ],
)
def test_cudnn_where_it_cannot_run(capability, dtype, head_dim, packed, reason, monkeypatch):
    if capability:
        on_gpu(monkeypatch, capability)
    with pytest.raises(ValueError, match=f"attn_impl='cudnn' cannot run here: .*{reason}"):
        resolve_implementation("cudnn", dtype, head_dim, packed=packed)
    assert resolve_implementation("auto", dtype, head_dim, packed=packed) == "xla"


def test_cudnn_where_it_can_run(monkeypatch):
    on_gpu(monkeypatch, "9.0")
    for impl in ("auto", "cudnn"):
        assert resolve_implementation(impl, jnp.bfloat16, 256, packed=True) == "cudnn"
    assert resolve_implementation("xla", jnp.bfloat16, 256, packed=True) == "xla"


def test_unknown_implementations_are_refused():
    with pytest.raises(ValueError, match="attn_impl must be auto, xla or cudnn, got 'flash'"):
        attend(*draw(), impl="flash")  # pyright: ignore[reportArgumentType]


# On a GPU

GPU_ROWS = {
    "even": [[128] * 4, [128] * 4],
    "uneven": [[100, 200, 212], [300, 50, 162]],
    "padding": [[100, 200, 150], [512]],
    "one-token documents": [[1, 1, 510], [1, 300, 1]],
    "one row": [[17, 400, 95]],
    "short": [[37] * 13, [60, 1, 59] * 4],
}


def packed_segments(documents, length):
    rows = [np.repeat(np.arange(1, len(row) + 1), row) for row in documents]
    return np.stack([np.pad(row, (0, length - len(row))) for row in rows]).astype(np.int32)


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [8, 2])
@pytest.mark.parametrize("sliding_window", [None, 37])
@pytest.mark.parametrize(
    ("case", "form"),
    [*itertools.product(GPU_ROWS, ("by document", "by mask")), ("unpacked", "whole rows")],
)
def test_cudnn_equals_masked_float32(case, form, sliding_window, groups):
    length, heads, head_dim = 512, 8, 128
    documents = GPU_ROWS.get(case, [[512], [512]])
    segments = jnp.asarray(packed_segments(documents, length))
    window = 128
    while window < max(map(max, documents)):
        window *= 2
    rows = len(documents)
    q, k, v = draw(rows, length, heads, groups, head_dim, jnp.bfloat16)
    g = jax.random.normal(jax.random.key(9), q.shape, jnp.bfloat16)
    # Nothing is asked of padding but to stay apart.
    g = jnp.where((segments > 0)[:, :, None, None], g, jnp.zeros((), g.dtype))

    def compute(impl, dtype):
        documents = None
        if form == "by document":
            documents = find_documents(segments, DocumentLayout(window, 6))
        elif form == "by mask":
            documents = Documents(segments)

        def loss(*inputs):
            out = attend(*inputs, documents=documents, sliding_window=sliding_window, impl=impl)
            return (out.astype(jnp.float32) * g.astype(jnp.float32)).sum(), out

        inputs = [x.astype(dtype) for x in (q, k, v)]
        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
        (_, out), gradients = run(*inputs)
        return jax.tree.map(lambda x: np.asarray(x, np.float32), (out, *gradients))

    exact = compute("xla", jnp.float32)
    rounded, found = compute("xla", jnp.bfloat16), compute("cudnn", jnp.bfloat16)
    valid = np.asarray(segments > 0)
    error = lambda a, b: np.linalg.norm((a - b)[valid]) / np.linalg.norm(b[valid])
    for ours, xla, expected in zip(found, rounded, exact, strict=True):
        assert np.isfinite(ours).all()
        # cuDNN may err as much as bfloat16 itself does, computed by XLA, and a little more.
        assert error(ours, expected) <= 2 * error(xla, expected) + 1e-3
