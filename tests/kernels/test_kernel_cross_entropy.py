"""Cross-entropy whose gradient takes the logits' place: values against float64, and the choice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lorax.objectives.linear_loss
from lorax.adapters.nnx.apply import set_kernels
from lorax.devices.mesh import DATA_AXIS, make_mesh
from lorax.models.decoder import CausalLM
from lorax.models.families import read_architecture
from lorax.objectives.linear_loss import linear_cross_entropy, logit_chunks
from lorax.objectives.sft import causal_lm_loss
from lorax_kernels import IGNORED, cross_entropy, token_nll, token_nll_and_gradient
from lorax_kernels.device import interpreted
from tests.jaxprs import equations, on_h200

UNIT = {"bfloat16": 3.9e-3, "float16": 4.9e-4}
BOTH = {"soft_cap": 5.0, "z_loss": 0.1}


def draw(shape, dtype):
    """Returns logits and labels: of no token's, the first's and the last token's among them."""
    numbers = np.random.default_rng(0)
    # From rows that are all but certain of one token to rows that know nothing.
    spread = np.logspace(1.3, -1, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    logits = numbers.normal(size=shape) * spread
    labels = numbers.integers(0, shape[-1], shape[:-1])
    labels.flat[:3] = IGNORED, 0, shape[-1] - 1
    # Tokens that cannot be: the first 64, and some in the middle.
    logits.reshape(-1, shape[-1])[2, :64] = logits.reshape(-1, shape[-1])[1, 70:128] = -np.inf
    return jnp.asarray(logits, dtype), jnp.asarray(labels, jnp.int32)


def exact(logits, labels, **options):
    """Returns both, in float64 and by JAX's own differentiation."""
    with jax.enable_x64(True):
        wide = jnp.asarray(np.asarray(logits, np.float64))
        nll, pull = jax.vjp(lambda scores: token_nll(scores, labels, **options), wide)
        return np.asarray(nll), np.asarray(pull(jnp.ones_like(nll))[0])


@pytest.mark.parametrize("kernels", ["pallas", "xla"])
@pytest.mark.parametrize("block", [64, 8192])
@pytest.mark.parametrize("options", [{}, {"soft_cap": 5.0}, {"z_loss": 0.1}, BOTH])
@pytest.mark.parametrize("shape, dtype", [((5, 128), "bfloat16"), ((2, 3, 201), "float16")])
def test_both_are_exact_to_a_rounding(shape, dtype, options, block, kernels, monkeypatch):
    monkeypatch.setattr(cross_entropy, "BLOCK", block)
    logits, labels = draw(shape, dtype)
    cross_entropy._nll_and_gradient.clear_cache()  # no kernel of another block is used again
    with interpreted(3):
        nll, gradient = token_nll_and_gradient(logits, labels, kernels=kernels, **options)
    want_nll, want = exact(logits, labels, **options)
    assert (nll.dtype, gradient.dtype) == (jnp.float32, dtype)
    np.testing.assert_allclose(nll, want_nll, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(np.float64(gradient), want, rtol=UNIT[dtype] + 1e-5, atol=1e-6)


@pytest.mark.parametrize("kernels", ["pallas", "xla"])
def test_a_token_without_supervision_is_zero_and_one_with_a_wrong_label_nan(kernels):
    logits, _ = draw((5, 128), "bfloat16")
    logits = logits.at[0, 3].set(jnp.nan)  # where nothing is learnt, nothing is spoilt
    with interpreted(3):
        labels = jnp.asarray([IGNORED, 128, -1, -101, 127], jnp.int16)
        nll, gradient = token_nll_and_gradient(logits, labels, kernels=kernels)
    assert nll[0] == 0 and not gradient[0].any()
    assert np.isnan(nll[1:4]).all() and np.isnan(np.float32(gradient[1:4])).all()
    assert np.isfinite(nll[4]) and np.isfinite(np.float32(gradient[4])).all()


@pytest.mark.parametrize("kernels", ["pallas", "xla"])
def test_what_is_no_number_shows(kernels):
    logits, labels = draw((5, 128), "bfloat16")
    with interpreted(3):
        changed = logits.at[3, 7].set(jnp.nan)
        nll, gradient = token_nll_and_gradient(changed, labels, kernels=kernels)
    assert np.isnan(nll).tolist() == [False, False, False, True, False]
    assert np.isnan(np.float32(gradient)).all(axis=1).tolist() == np.isnan(nll).tolist()


def test_the_shards_of_a_mesh_are_computed_apart():
    logits, labels = draw((4, 3, 201), "bfloat16")
    with interpreted(3):
        alone = token_nll_and_gradient(logits, labels)
        with jax.set_mesh(make_mesh(2)):
            function = functools.partial(token_nll_and_gradient, row_axes=(DATA_AXIS,))
            shared = jax.jit(function)(logits, labels)
    for ours, theirs in zip(shared, alone, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "kernels, dtype, runs",
    [
        ("auto", "bfloat16", True),
        ("auto", "float16", True),
        ("xla", "bfloat16", False),
        ("auto", "float32", False),
    ],
)
def test_where_the_kernel_runs_and_that_its_chunks_are_twice_as_long(kernels, dtype, runs):
    head = nnx.Linear(64, 500, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    hidden, labels = jnp.ones((2, 40, 64), dtype), jnp.zeros((2, 40), jnp.int32)
    with on_h200(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(lorax.objectives.linear_loss, "LOGIT_CHUNK_BYTES", 4 * 2 * 500 * 10)
        loss = lambda h: linear_cross_entropy(head, h, labels, kernels=kernels)
        found = list(equations(jax.make_jaxpr(jax.grad(loss))(hidden).jaxpr))
    assert ("pallas_call" in {e.primitive.name for e in found}) == runs
    longest = max(v.aval.shape[1] for e in found for v in e.outvars if v.aval.shape[2:] == (500,))
    assert longest == (20 if runs else 10)


def test_inside_a_shard_map_the_rows_are_those_of_one_shard():
    logits, labels = draw((4, 3, 201), "bfloat16")
    function = functools.partial(token_nll_and_gradient, row_axes=(DATA_AXIS,))
    rows = jax.sharding.PartitionSpec(DATA_AXIS)
    with interpreted(3):
        alone = function(logits, labels)
        with jax.set_mesh(make_mesh(2)):
            inside = jax.shard_map(function, in_specs=rows, out_specs=rows, check_vma=False)
            shared = jax.jit(inside)(logits, labels)
    for ours, theirs in zip(shared, alone, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_where_a_mesh_does_not_divide_the_rows_xla_works_in_chunks_of_its_own(monkeypatch):
    monkeypatch.setattr(lorax.objectives.linear_loss, "LOGIT_CHUNK_BYTES", 4 * 3 * 500 * 10)
    head = nnx.Linear(64, 500, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    hidden, labels = jnp.ones((3, 40, 64), "bfloat16"), jnp.zeros((3, 40), jnp.int32)
    with jax.set_mesh(make_mesh(2)), interpreted(3):
        loss = jax.grad(lambda h: linear_cross_entropy(head, h, labels))
        found = list(equations(jax.make_jaxpr(loss)(hidden).jaxpr))
    assert "pallas_call" not in {e.primitive.name for e in found}
    assert (
        max(v.aval.shape[1] for e in found for v in e.outvars if v.aval.shape[2:] == (500,)) == 10
    )


@pytest.mark.parametrize("kernels, runs", [("auto", True), ("xla", False)])
def test_a_model_s_kernels_decide_it(kernels, runs):
    sizes = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 256}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 64, "max_position_embeddings": 64}
    config = read_architecture(sizes, "here")
    model = CausalLM(config, dtype=jnp.bfloat16, attn_impl="xla", rngs=nnx.Rngs(0))
    set_kernels(model, kernels)
    graph, trainable, rest = nnx.split(model, nnx.Param, ...)
    batch = {name: jnp.zeros((1, 16), jnp.int32) for name in ("input_ids", "labels")}
    loss = lambda t: causal_lm_loss(nnx.merge(graph, t, rest), batch)[0]
    with on_h200():
        found = equations(jax.make_jaxpr(jax.grad(loss))(trainable).jaxpr)
        assert ("pallas_call" in {e.primitive.name for e in found}) == runs


def test_a_name_that_is_none_is_refused():
    logits, labels = draw((5, 128), "bfloat16")
    with pytest.raises(ValueError, match="kernels must be auto, pallas or xla, got 'Xla'"):
        token_nll_and_gradient(logits, labels, kernels="Xla")  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, BOTH])
@pytest.mark.parametrize("shape", [(2, 3, 1), (4, 5, 100), (4, 75, 128256)])
def test_it_lowers_for_the_gpu(shape, options):
    operands = jax.ShapeDtypeStruct(shape, "bfloat16"), jax.ShapeDtypeStruct(shape[:-1], "int32")
    with on_h200():
        traced = jax.jit(functools.partial(token_nll_and_gradient, **options)).trace(*operands)
        assert "cross_entropy" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_chunks_keep_to_the_budget():
    for in_place, size in ((False, 4), (True, 2)):
        number, length = logit_chunks(4, 2048, 128256, in_place)
        assert number * length >= 2048
        assert size * 4 * length * 128256 <= lorax.objectives.linear_loss.LOGIT_CHUNK_BYTES
        longer = -(-2048 // (number - 1))  # as few as that
        assert size * 4 * longer * 128256 > lorax.objectives.linear_loss.LOGIT_CHUNK_BYTES


def test_no_row_is_no_error():
    with interpreted(3):
        nll, gradient = token_nll_and_gradient(
            jnp.zeros((2, 0, 64), "bfloat16"), jnp.zeros((2, 0), jnp.int32)
        )
    assert nll.shape == (2, 0) and gradient.shape == (2, 0, 64)
