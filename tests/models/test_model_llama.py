"""The decoder: packed rows are separate texts, recomputation changes nothing, parts are open."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorax.layers import attention
from lorax.layers import documents as layers_documents
from lorax.layers.documents import DocumentLayout
from lorax.models import llama
from lorax.models.architecture import DecoderConfig
from lorax.models.decoder import CausalLM
from tests import tiny
from tests.bounds import EXACT, distance, in_float64

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = tiny.SMALL | dict(model_type="llama", num_hidden_layers=3)
DYNAMIC: dict[str, Any] = dict(
    max_position_embeddings=6, rope_scaling=dict(type="dynamic", factor=4.0)
)
WINDOW: dict[str, Any] = dict(model_type="mistral", sliding_window=4)


def make(gradient_checkpointing="none", **settings):
    config = DecoderConfig.from_hf(SMALL | settings, "here")
    options: dict[str, Any] = dict(gradient_checkpointing=gradient_checkpointing)
    # Asked for at each call, so that `in_float64` decides it.
    options |= dict(dtype=jnp.float32, param_dtype=jnp.float32)
    model = CausalLM(config, rngs=nnx.Rngs(0), **options)
    # Larger than at birth, so that attention is far from uniform.
    return jax.tree.map(lambda x: x if x.ndim == 1 else 10 * x, model)


@jax.jit
def run(model, *inputs):
    return model(*inputs)


@jax.jit
def run_states(model, *inputs, cache=None):
    return model.hidden_states(*inputs, cache=cache)


def pack(rows, length):
    """Returns ids, positions and segment ids of rows of documents, padded on the right."""
    fill = lambda parts: np.pad(np.concatenate(parts), (0, length - sum(map(len, parts))))
    ids = [fill(row) for row in rows]
    positions = [fill([np.arange(len(d)) for d in row]) for row in rows]
    segments = [fill([np.full(len(d), i + 1) for i, d in enumerate(row)]) for row in rows]
    return [jnp.asarray(np.stack(x), jnp.int32) for x in (ids, positions, segments)]


def draw_documents():
    rng = np.random.default_rng(0)
    sizes = [[5, 9, 1], [16], [7, 4]]
    return [[rng.integers(0, 61, size) for size in row] for row in sizes]


@pytest.mark.parametrize("settings", [{}, DYNAMIC, WINDOW], ids=["full", "dynamic", "window"])
def test_packed_documents_have_the_logits_they_have_alone(settings):
    model, rows = make(**settings), draw_documents()
    ids, positions, segments = pack(rows, 16)
    packed = run(model, ids, positions, segments)
    for row, documents in enumerate(rows):
        start = 0
        for document in documents:
            size = len(document)
            alone = run(model, *pack([[document]], 16)[:2])[0, :size]
            found = packed[row, start : start + size]
            np.testing.assert_allclose(found, alone, rtol=1e-5, atol=1e-5)
            start += size


def test_a_document_does_not_see_its_neighbours():
    model, rows = make(), draw_documents()
    before = run(model, *pack(rows, 16))
    rows[0][1] = (rows[0][1] + 1) % 61
    after = run(model, *pack(rows, 16))
    np.testing.assert_array_equal(after[0, :5], before[0, :5])
    np.testing.assert_array_equal(after[0, 14:], before[0, 14:])
    assert not np.allclose(after[0, 5:14], before[0, 5:14])


def test_padding_on_the_right_changes_nothing():
    model = make()
    ids = jnp.arange(10, dtype=jnp.int32)[None]
    padded = run(model, jnp.pad(ids, ((0, 0), (0, 6))))[:, :10]
    np.testing.assert_allclose(padded, run(model, ids), rtol=1e-5, atol=1e-5)


def test_a_token_does_not_see_later_ones():
    model, ids = make(), jnp.arange(10, dtype=jnp.int32)[None]
    changed = ids.at[0, 6].set(50)
    np.testing.assert_array_equal(run(model, ids)[:, :6], run(model, changed)[:, :6])


def value_and_gradient(model, *inputs):
    graph, state = nnx.split(model)

    def loss(state):
        logits = nnx.merge(graph, state)(*inputs)
        return jnp.square(jax.nn.log_softmax(logits)).mean()

    return jax.jit(jax.value_and_grad(loss))(state), loss, state


@pytest.mark.parametrize("packed", [False, True])
def test_recomputation_gives_the_same_gradients(packed):
    inputs = pack(draw_documents(), 16)[: 3 if packed else 1]
    with in_float64():
        expected, found = (value_and_gradient(make(p), *inputs)[0] for p in ("none", "full"))
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert ours.dtype == np.float64 and np.linalg.norm(theirs) > 0
        assert distance(ours, theirs) <= EXACT


def saved_shapes(model, ids):
    """Returns the shapes of what the backward pass of the layers keeps, weights aside."""
    graph, state = nnx.split(model)
    run = lambda state: nnx.merge(graph, state).hidden_states(ids)
    _, backward = jax.vjp(run, state)
    weights = {id(x) for x in jax.tree.leaves(state)}
    return [x.shape for x in jax.tree.leaves(backward) if id(x) not in weights]


def test_recomputation_keeps_only_the_input_of_each_layer_but_the_last():
    ids = jnp.zeros((2, 24), jnp.int32)
    # Inputs are 2 × 24 × 32; of the MLP's inner 2 × 24 × 48 and the scores 24 × 24 only those of
    # the last layer are kept.
    kept, everything = (saved_shapes(make(policy), ids) for policy in ("full", "none"))
    for large in (lambda s: 48 in s, lambda s: s.count(24) > 1):
        some, all_of_them = (len([*filter(large, shapes)]) for shapes in (kept, everything))
        assert 0 < some <= all_of_them / SMALL["num_hidden_layers"]
    # One per layer, and what the last one, the final norm and the embedding keep of their own.
    layers = [s for s in kept if s == (2, 24, 32)]
    assert SMALL["num_hidden_layers"] <= len(layers) <= SMALL["num_hidden_layers"] + 4


class Doubled(nnx.Module):
    """Any module that is called like the linear layer it replaces."""

    def __init__(self, inner):
        self.inner, self.factor = inner, nnx.Param(jnp.float32(2.0))

    def __call__(self, x):
        return self.inner(x) * self.factor[...]


@pytest.mark.parametrize("gradient_checkpointing", ["none", "selective", "full"])
def test_linear_layers_may_be_replaced(gradient_checkpointing):
    model, ids = make(gradient_checkpointing), jnp.arange(8, dtype=jnp.int32)[None]
    expected = make()
    for layer, plain in zip(model.model.layers, expected.model.layers, strict=True):
        layer.self_attn.o_proj = Doubled(layer.self_attn.o_proj)
        layer.mlp.down_proj = Doubled(layer.mlp.down_proj)
        for linear in (plain.self_attn.o_proj, plain.mlp.down_proj):
            linear.kernel.set_value(linear.kernel[...] * 2)
    model.lm_head = Doubled(model.lm_head)
    np.testing.assert_allclose(run(model, ids), 2 * run(expected, ids), rtol=1e-5, atol=1e-5)
    (_, gradient), _, _ = value_and_gradient(model, ids)
    assert float(jnp.abs(gradient["model"]["layers"][2]["mlp"]["down_proj"]["factor"][...])) > 0


@pytest.mark.parametrize("gradient_checkpointing", ["none", "selective", "full"])
def test_no_weight_is_a_constant_of_the_compiled_program(gradient_checkpointing):
    model, ids = make(gradient_checkpointing), jnp.zeros((1, 4), jnp.int32)
    graph, state = nnx.split(model)
    jaxpr = jax.make_jaxpr(lambda s, i: nnx.merge(graph, s)(i))(state, ids)
    # The rotary frequencies are the only array that is not an argument.
    assert all(np.size(c) <= 32 for c in jaxpr.consts)


def test_a_tied_head_reads_the_embedding_which_keeps_its_place():
    model = make(tie_word_embeddings=True)
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(model))]
    assert ("model", "embed_tokens", "embedding") in paths
    assert "lm_head" not in {path[0] for path in paths}
    hidden = jnp.ones((1, 1, 32))
    expected = hidden @ model.model.embed_tokens.embedding[...].T
    np.testing.assert_allclose(model.lm_head(hidden), expected, rtol=1e-6)
    embedding = model.model.embed_tokens
    embedding.embedding.set_value(embedding.embedding[...] * 2)
    np.testing.assert_allclose(model.logits(hidden), 2 * expected, rtol=1e-6)
    with pytest.raises(AttributeError, match="CausalLM has no attribute 'head'"):
        _ = model.head


def test_both_uses_of_a_tied_embedding_get_gradients():
    ids = jnp.arange(4, dtype=jnp.int32)[None]
    (_, gradient), _, _ = value_and_gradient(make(tie_word_embeddings=True), ids)
    rows = jnp.abs(gradient["model"]["embed_tokens"]["embedding"][...]).sum(axis=1)
    # Rows 4 and up are never looked up: their gradient comes through the head.
    assert (rows[:4] > 0).all() and (rows[4:] > 0).all()


@pytest.mark.parametrize("settings", [{}, WINDOW], ids=["full", "window"])
def test_tokens_one_by_one_through_the_cache_equal_the_whole(settings):
    model = make(**settings)
    ids = jax.random.randint(jax.random.key(1), (2, 14), 0, 61)
    # Rows of 6 and 3 tokens are stored, the shorter padded; then each goes on at its own place.
    lengths = jnp.array([6, 3])
    positions = jnp.minimum(jnp.arange(6)[None], lengths[:, None] - 1)
    prompt = jnp.where(jnp.arange(6)[None] < lengths[:, None], ids[:, :6], 60)
    _, cache = run_states(model, prompt, positions, cache=model.init_cache(2, 16))
    last = []
    for step in range(8):
        at = (lengths + step)[:, None]
        token = jnp.take_along_axis(ids, at, axis=1)
        hidden, cache = run_states(model, token, at, cache=cache)
        last.append(hidden[:, 0])
    whole = run_states(model, ids)
    for step, found in enumerate(last):
        for row in range(2):
            expected = whole[row, int(lengths[row]) + step]
            np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-4)


def test_cache_misuse_is_refused():
    model, ids = make(), jnp.zeros((1, 3), jnp.int32)
    cache = model.init_cache(1, 8)
    with pytest.raises(ValueError, match="pass no segment_ids"):
        model.hidden_states(ids, segment_ids=ids, cache=cache)
    _, cache = model.hidden_states(ids, cache=cache)
    with pytest.raises(ValueError, match="needs the positions of the new tokens"):
        model.hidden_states(ids, cache=cache)


def test_rows_with_more_documents_than_promised_become_nan(monkeypatch):
    monkeypatch.setattr(attention, "cudnn_obstacle", lambda *a, **k: None)
    monkeypatch.setattr(layers_documents, "_packed_kernel", lambda q, *a, **k: q)
    model, inputs = make(), pack(draw_documents(), 16)
    model.document_layout = DocumentLayout(16, 2)
    bad = jnp.isnan(model.hidden_states(*inputs)).all(axis=(1, 2))
    assert bad.tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(gradient_checkpointing=True), "must be none, selective, full or offload, got True"),
        (dict(attn_impl="flash"), "attn_impl must be auto, xla or cudnn"),
        (dict(attn_impl="cudnn"), "cannot run here: it needs an NVIDIA GPU"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CausalLM(DecoderConfig.from_hf(SMALL, "here"), rngs=nnx.Rngs(0), **options)


def test_activations_have_the_compute_dtype_and_logits_are_float32():
    config = DecoderConfig.from_hf(SMALL, "here")
    model = CausalLM(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    ids = jnp.zeros((1, 3), jnp.int32)
    assert model.hidden_states(ids).dtype == jnp.bfloat16
    assert model(ids).dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.float32)}
    assert model.init_cache(1, 4).layers[0][0].dtype == jnp.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [DocumentLayout(128, 3), None])
@pytest.mark.parametrize("gradient_checkpointing", ["none", "selective", "full"])
def test_packed_training_on_cudnn_equals_xla(gradient_checkpointing, layout):
    settings = SMALL | dict(hidden_size=256, num_attention_heads=4, head_dim=64)
    config = DecoderConfig.from_hf(settings, "here")
    inputs = pack(draw_documents(), 128)
    found = {}
    runs: dict[str, tuple[Any, Any]] = {
        "exact": (jnp.float32, "xla"),
        "xla": (jnp.bfloat16, "xla"),
        "cudnn": (jnp.bfloat16, "cudnn"),
    }
    for name, (dtype, impl) in runs.items():
        model = CausalLM(
            config,
            dtype=dtype,
            attn_impl=impl,
            gradient_checkpointing=gradient_checkpointing,
            rngs=nnx.Rngs(0),
        )
        model.document_layout = layout
        (_, gradient), _, _ = value_and_gradient(model, *inputs)
        leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(gradient)]
        found[name] = np.concatenate(leaves)
    error = lambda name: np.linalg.norm(found[name] - found["exact"])
    assert error("cudnn") <= 1.5 * error("xla")


def test_layers_are_named_as_in_the_checkpoint():
    model = make(model_type="qwen3", head_dim=8)
    layer = model.model.layers[0]
    assert isinstance(layer, llama.DecoderLayer)
    assert isinstance(layer.self_attn.q_proj, nnx.Linear)
    assert layer.self_attn.q_norm.weight.shape == (8,)
