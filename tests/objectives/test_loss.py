"""The head and its cross-entropy in one: PyTorch is the oracle, in float64."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import lorax.objectives.linear_loss
from lorax.adapters.nnx.apply import apply_lora, set_dropout_key
from lorax.config.adapter import LoraConfig
from lorax.layers.carrier import Frozen
from lorax.objectives.linear_loss import linear_cross_entropy
from lorax_kernels import IGNORED, token_nll
from tests.jaxprs import equations

ROWS, LENGTH, WIDTH, VOCABULARY = 3, 13, 8, 29


class Model(nnx.Module):
    """Only a head, for `apply_lora`."""

    def __init__(self, dtype):
        self.lm_head = nnx.Linear(
            WIDTH, VOCABULARY, use_bias=True, param_dtype=dtype, dtype=dtype, rngs=nnx.Rngs(0)
        )


@pytest.fixture
def wide():
    with jax.enable_x64(True):
        yield jnp.float64


@pytest.fixture
def inputs(wide):
    draw = np.random.default_rng(0)
    hidden = draw.normal(size=(ROWS, LENGTH, WIDTH)) * 3
    labels = draw.integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
    labels[0, :5] = labels[2, 11:] = IGNORED
    return jnp.asarray(hidden, wide), jnp.asarray(labels)


def torch_loss(head, hidden, labels, soft_cap, z_loss):
    """Returns PyTorch's sum and its gradients: of the weight, the bias and the input."""
    tensors = [
        torch.tensor(np.array(a, np.float64), requires_grad=True)
        for a in (head.kernel[...], head.bias[...], hidden)
    ]
    weight, bias, states = tensors
    logits = states @ weight + bias
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    flat, targets = logits.flatten(0, 1), torch.tensor(np.array(labels)).flatten().long()
    loss = torch.nn.functional.cross_entropy(flat, targets, ignore_index=IGNORED, reduction="sum")
    lse = torch.logsumexp(flat, dim=-1)
    loss = loss + z_loss * (lse[targets != IGNORED] ** 2).sum()
    loss.backward()
    return loss.item(), [t.grad.numpy() for t in tensors]


def loss_and_gradients(head, hidden, labels, **options):
    graph, trainable, rest = nnx.split(head, nnx.Param, ...)

    def loss(trainable, hidden):
        return linear_cross_entropy(nnx.merge(graph, trainable, rest), hidden, labels, **options)

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(trainable, hidden)


@pytest.mark.parametrize(
    "soft_cap, z_loss, chunk",
    [*itertools.product((None, 5.0), (0.0, 0.1), (LENGTH,)), (None, 0.0, 5), (5.0, 0.1, 1)],
)
def test_loss_and_gradients_are_those_of_pytorch(inputs, monkeypatch, soft_cap, z_loss, chunk):
    monkeypatch.setattr(
        lorax.objectives.linear_loss, "LOGIT_CHUNK_BYTES", 4 * VOCABULARY * ROWS * chunk
    )
    (hidden, labels), head = inputs, Model(jnp.float64).lm_head
    want, (of_weight, of_bias, of_hidden) = torch_loss(head, hidden, labels, soft_cap, z_loss)
    loss, (of_head, got_hidden) = loss_and_gradients(
        head, hidden, labels, soft_cap=soft_cap, z_loss=z_loss
    )
    assert float(loss) == pytest.approx(want, rel=1e-12)
    for ours, theirs in (
        (of_head["kernel"][...], of_weight),
        (of_head["bias"][...], of_bias),
        (got_hidden, of_hidden),
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)
    alone = token_nll(head(hidden), labels, soft_cap=soft_cap, z_loss=z_loss)
    assert float(alone.sum()) == pytest.approx(want, rel=1e-12)
    assert (np.asarray(alone)[np.asarray(labels) == IGNORED] == 0).all()


def test_a_head_with_an_adapter_trains_the_adapter_alone(inputs, monkeypatch):
    monkeypatch.setattr(
        lorax.objectives.linear_loss, "LOGIT_CHUNK_BYTES", 4 * VOCABULARY * ROWS * 4
    )
    hidden, labels = inputs
    settings = LoraConfig(r=2, target_modules=["lm_head"])
    head = apply_lora(Model(jnp.float64), settings, rngs=nnx.Rngs(1)).lm_head
    a, b = (np.random.default_rng(i).normal(size=s) for i, s in ((1, (WIDTH, 2)), (2, (2, 29))))
    head.adapter.lora_a.set_value(jnp.asarray(a))
    head.adapter.lora_b.set_value(jnp.asarray(b))
    loss, (of_head, of_hidden) = loss_and_gradients(head, hidden, labels)
    merged = nnx.Linear(WIDTH, VOCABULARY, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    merged.kernel.set_value(head.kernel[...] + head.adapter.spec.scale * (a @ b))
    merged.bias.set_value(head.bias[...])
    want, (of_weight, _, want_hidden) = torch_loss(merged, hidden, labels, None, 0.0)
    assert float(loss) == pytest.approx(want, rel=1e-12)
    of_adapter = of_head["attached"]["default"]
    assert set(of_head) == {"attached"} and set(of_adapter) == {"lora_a", "lora_b"}
    np.testing.assert_allclose(of_hidden, want_hidden, rtol=1e-10, atol=1e-12)
    for name, theirs in (("lora_a", of_weight @ b.T), ("lora_b", a.T @ of_weight)):
        scaled = head.adapter.spec.scale * theirs
        np.testing.assert_allclose(of_adapter[name][...], scaled, rtol=1e-10, atol=1e-12)


def test_a_label_that_is_no_token_makes_the_loss_nan(inputs):
    hidden, labels = inputs
    head = Model(jnp.float64).lm_head
    for wrong in (VOCABULARY, -1, -101):
        loss, (_, of_hidden) = loss_and_gradients(head, hidden, labels.at[1, 4].set(wrong))
        assert np.isnan(float(loss))
        assert np.isnan(of_hidden[1, 4]).all() and np.isfinite(of_hidden[1, 5]).all()


def test_a_frozen_head_is_multiplied_twice_and_its_logits_never_stand_in_memory(monkeypatch):
    monkeypatch.setattr(
        lorax.objectives.linear_loss, "LOGIT_CHUNK_BYTES", 4 * VOCABULARY * ROWS * 4
    )
    head = Model(jnp.float32).lm_head
    head.kernel, head.bias = Frozen(head.kernel[...]), Frozen(head.bias[...])
    hidden, labels = jnp.ones((ROWS, LENGTH, WIDTH)), jnp.zeros((ROWS, LENGTH), jnp.int32)
    loss = lambda hidden: linear_cross_entropy(head, hidden, labels)
    found = list(equations(jax.make_jaxpr(jax.value_and_grad(loss))(hidden).jaxpr))
    products = [e for e in found if e.primitive.name == "dot_general"]
    assert len(products) == 2  # logits and the gradient of the states, once per chunk
    shapes = {v.aval.shape for e in found for v in e.outvars if hasattr(v.aval, "shape")}
    of_logits = {shape for shape in shapes if shape[-1:] == (VOCABULARY,)}
    assert max(map(math.prod, of_logits)) == ROWS * 4 * VOCABULARY


def test_a_scaled_loss_scales_float16_gradients_without_overflow():
    draw = np.random.default_rng(0)
    hidden = jnp.asarray(draw.normal(size=(1, 4, WIDTH)) * 0.1, jnp.float16)
    labels, head = jnp.zeros((1, 4), jnp.int8), Model(jnp.float16).lm_head
    gradient = jax.grad(lambda h, s: linear_cross_entropy(head, h, labels) * s)
    scaled, plain = gradient(hidden, jnp.float32(7e4)), gradient(hidden, jnp.float32(1.0))
    np.testing.assert_allclose(np.float32(scaled), np.float32(plain) * 7e4, rtol=2e-3)


def test_the_sum_over_chunks_of_a_half_precision_head_is_float32(monkeypatch):
    draw = np.random.default_rng(0)
    hidden = jnp.asarray(draw.normal(size=(1, 512, WIDTH)), jnp.bfloat16)
    labels = jnp.asarray(draw.integers(0, VOCABULARY, (1, 512)), jnp.int32)
    head = Model(jnp.bfloat16).lm_head
    _, (want, _, _) = torch_loss(head, hidden, labels, None, 0.0)
    monkeypatch.setattr(lorax.objectives.linear_loss, "LOGIT_CHUNK_BYTES", 4 * VOCABULARY)
    got = np.float64(loss_and_gradients(head, hidden, labels)[1][0]["kernel"][...])
    assert np.linalg.norm(got - want) <= 4e-3 * np.linalg.norm(want)  # added in bfloat16: 2e-2


def test_narrow_labels_mean_what_wide_ones_mean():
    head = nnx.Linear(WIDTH, 300, rngs=nnx.Rngs(0))
    hidden, labels = jnp.ones((1, 4, WIDTH)), jnp.array([[0, 1, 99, IGNORED]])
    want = linear_cross_entropy(head, hidden, labels)
    assert float(linear_cross_entropy(head, hidden, labels.astype(jnp.int8))) == float(want)
    assert float(linear_cross_entropy(head, hidden[:, :0], labels[:, :0])) == 0.0


def test_dropout_in_the_head_draws_another_mask_in_every_chunk(monkeypatch):
    monkeypatch.setattr(lorax.objectives.linear_loss, "LOGIT_CHUNK_BYTES", 4 * VOCABULARY * 8)
    settings = LoraConfig(r=2, target_modules=["lm_head"], lora_dropout=0.5)
    model = apply_lora(Model(jnp.float32), settings, rngs=nnx.Rngs(1))
    set_dropout_key(model, jax.random.key(0))
    model.lm_head.adapter.lora_b.set_value(jax.random.normal(jax.random.key(2), (2, VOCABULARY)))
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, WIDTH)), jnp.float32)
    twice, labels = jnp.concatenate([rows, rows], axis=1), jnp.zeros((1, 16), jnp.int32)
    gradient = jax.grad(lambda h: linear_cross_entropy(model.lm_head, h, labels))(twice)
    assert float(jnp.abs(gradient[:, :8] - gradient[:, 8:]).max()) > 1e-3


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"labels": jnp.zeros((1, 5), jnp.int32)}, r"hidden \(b, t, d\) and labels \(b, t\)"),
        ({"hidden": jnp.zeros((5, WIDTH))}, r"hidden \(b, t, d\) and labels \(b, t\)"),
        ({"labels": jnp.zeros((2, 5))}, "labels are token ids, got float32"),
        ({"soft_cap": 0.0}, "soft_cap must be positive or None, got 0.0"),
        ({"z_loss": -1.0}, "z_loss must not be negative, got -1.0"),
    ],
)
def test_refuses_what_it_would_misread(changes, message):
    given = {"hidden": jnp.zeros((2, 5, WIDTH)), "labels": jnp.zeros((2, 5), jnp.int32)}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(Model(jnp.float32).lm_head, **(given | changes))
