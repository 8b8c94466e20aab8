"""The accumulation rule: many micro-batches equal one large batch, on one device and on four."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lorax
from lorax.data.batches import Batches
from lorax.data.dataset import EncodedDataset
from lorax.devices.mesh import make_mesh
from lorax.devices.placement import place_batch, place_parameters
from lorax.models.decoder import CausalLM
from lorax.models.families import read_architecture
from lorax.objectives.sft import causal_lm_loss
from lorax.training.accumulate import accumulate
from lorax.training.step import make_train_step
from lorax_kernels import IGNORED

pytestmark = pytest.mark.slow

CONFIG = read_architecture(
    {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
    "test",
)
ROWS = 16


@pytest.fixture(scope="module")
def model():
    base = CausalLM(CONFIG, rngs=nnx.Rngs(0))
    adapted = lorax.apply_lora(base, lorax.LoraConfig(r=4), rngs=nnx.Rngs(1))
    graph, trainable, rest = lorax.split_trainable(adapted)
    leaves, tree = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    # B must not be zero, or the gradient of A is.
    drawn = [0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, drawn), rest)


@pytest.fixture(scope="module")
def dataset():
    """Rows of 4 to 120 tokens; the last quarter of the rows has the most supervised tokens."""
    draw = np.random.default_rng(0)
    rows = []
    for index, length in enumerate(draw.permutation(np.linspace(4, 120, ROWS).astype(int))):
        tokens = draw.integers(0, 97, length)
        rows.append((tokens, np.arange(length) >= length // (1 + index % 3)))
    return EncodedDataset.from_rows(rows)


def batch_of(dataset, micro_batches, packing=False, empty=False):
    plan = Batches(
        dataset,
        rows_per_micro_batch=-(-ROWS // micro_batches),
        micro_batches=micro_batches + empty,
        packing=packing,
        max_seq_length=128,
        seed=0,
        shuffle=True,
    )
    return next(iter(plan.epoch(0)))


def gradients(model, batch, average=accumulate, mesh=None):
    graph, trainable, frozen = lorax.split_trainable(model)
    if mesh is not None:
        trainable, frozen = place_parameters((trainable, frozen), mesh)
        batch = place_batch(batch, mesh)

    def loss_fn(trainable, batch):
        return causal_lm_loss(nnx.merge(graph, trainable, frozen), batch)

    loss, count, found = jax.jit(average(loss_fn))(trainable, batch)
    return float(loss), float(count), jax.tree.map(np.asarray, jax.tree.leaves(found))


def mean_of_means(loss_fn):
    """What averages micro-batch means instead: the negative control."""

    def mean_loss(parameters, batch):
        total, count = loss_fn(parameters, batch)
        return total / jnp.maximum(count, 1).astype(jnp.float32)

    def averaged(parameters, batches):
        parts = jax.lax.map(lambda batch: jax.value_and_grad(mean_loss)(parameters, batch), batches)
        mean = jax.tree.map(lambda x: x.mean(axis=0), parts)
        return mean[0], jnp.float32(0), mean[1]

    return averaged


def one_too_many(loss_fn):
    """Divides by N + 1: the planted fault."""

    def counted(parameters, batches):
        loss, count, found = accumulate(loss_fn)(parameters, batches)
        shrink = count / (count + 1)
        return loss * shrink, count, jax.tree.map(lambda g: g * shrink, found)

    return counted


def worst(actual, expected):
    pairs = zip(actual, expected, strict=True)
    return max(np.linalg.norm(a - e) / np.linalg.norm(e) for a, e in pairs)


@pytest.fixture(scope="module")
def exact(model, dataset):
    """Loss, count and gradients of one large batch."""
    return gradients(model, batch_of(dataset, 1))


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 8, 16])
def test_accumulated_gradient_equals_the_large_batch(
    model, dataset, exact, micro_batches, packing, devices
):
    batch = batch_of(dataset, micro_batches, packing, empty=True)
    batch = {k: np.roll(v, 1, axis=0) for k, v in batch.items()}
    assert (batch["labels"][0] == IGNORED).all()
    mesh = None
    if devices > 1:
        mesh = make_mesh(devices)
        batch = {k: _fill_rows(k, v, devices) for k, v in batch.items()}
    loss, count, found = gradients(model, batch, mesh=mesh)
    assert count == exact[1] == int(dataset.supervised.sum())
    assert abs(loss - exact[0]) <= 1e-5 * exact[0]
    assert worst(found, exact[2]) <= 1e-5


def _fill_rows(name, array, devices):
    """Adds empty rows, so that the rows divide over the devices."""
    missing = -array.shape[1] % devices
    fill = IGNORED if name == "labels" else 0
    return np.pad(array, ((0, 0), (0, missing), (0, 0)), constant_values=fill)


@pytest.mark.parametrize("micro_batches", [3, 8, 16])
def test_the_mean_of_micro_batch_means_is_far_off(model, dataset, exact, micro_batches):
    _, _, naive = gradients(model, batch_of(dataset, micro_batches), mean_of_means)
    assert worst(naive, exact[2]) > 0.1


def test_a_count_that_is_one_too_high_is_seen(model, dataset, exact):
    _, _, planted = gradients(model, batch_of(dataset, 4), one_too_many)
    assert worst(planted, exact[2]) > 0.5 / exact[1] > 1e-5


def test_a_window_without_supervision_gives_zero_and_no_nan(model, dataset):
    batch = batch_of(dataset, 2)
    batch["labels"][:] = IGNORED
    loss, count, found = gradients(model, batch)
    assert loss == count == 0
    assert not any(g.any() for g in found)


def test_the_step_clips_the_whole_gradient_once(model, dataset, exact):
    """Clipping micro-batches, or before the division, would give another update."""
    batch = batch_of(dataset, 4)
    loss, _, gradient = exact
    norm = np.sqrt(sum((g**2).sum() for g in gradient))
    optimizer = optax.chain(optax.clip_by_global_norm(norm / 3), optax.sgd(1.0))
    step, state = make_train_step(model, optimizer)
    before = jax.tree.map(np.asarray, jax.tree.leaves(state.trainable))
    state, metrics = step(state, batch)
    after = jax.tree.leaves(state.trainable)
    moved = [b - np.asarray(a) for b, a in zip(before, after, strict=True)]
    assert worst(moved, [g / 3 for g in gradient]) <= 1e-4
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-5)


def test_micro_batches_of_different_number_are_refused():
    run = accumulate(lambda p, b: ((p * b["x"]).sum(), jnp.float32(1)))
    with pytest.raises(ValueError, match="one leading axis of micro-batches"):
        run(jnp.float32(1), {"x": jnp.ones((2, 3)), "y": jnp.ones((3, 3))})


@pytest.mark.parametrize(
    "loss_fn",
    [lambda p, b: (p * b).mean(), lambda p, b: (p * b, b), lambda p, b: ((p * b).sum(), 1, 2)],
)
def test_a_loss_that_is_no_sum_and_count_is_refused_in_words(loss_fn):
    with pytest.raises(ValueError, match=r"must return \(sum of losses, count\)"):
        accumulate(loss_fn)(jnp.float32(1), jnp.ones((2, 3)))


def test_a_count_may_be_a_plain_number():
    loss, count, _ = accumulate(lambda p, b: ((p * b).sum(), 3))(jnp.float32(2), jnp.ones((2, 3)))
    assert (float(loss), float(count)) == (2.0, 6.0)


def test_chunked_logits_give_the_same_loss_and_gradient(model, dataset, exact, monkeypatch):
    batch, whole = batch_of(dataset, 1), exact
    monkeypatch.setattr("lorax.objectives.linear_loss.LOGIT_CHUNK_BYTES", 4 * 97 * ROWS * 8)
    chunked = gradients(model, batch)
    assert chunked[0] == pytest.approx(whole[0], rel=1e-6)
    assert worst(chunked[2], whole[2]) <= 1e-5
