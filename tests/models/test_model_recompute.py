"""What the backward pass keeps and what it makes again, policy by policy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorax.adapters.nnx.apply import apply_lora
from lorax.adapters.nnx.tree import split_trainable
from lorax.config.adapter import LoraConfig
from lorax.models.decoder import CausalLM
from lorax.models.families import read_architecture
from lorax.models.stack.offload import run_in_order
from lorax.models.stack.recompute import Recomputation
from lorax.objectives.sft import causal_lm_loss
from tests.bounds import EXACT, distance, in_float64
from tests.jaxprs import equations

LAYERS, WIDTH, INNER, ROWS, LENGTH = 3, 64, 192, 2, 24
REPEATED = LAYERS - 1  # the backward pass begins with the last layer, which is still there
CONFIG = read_architecture(
    {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    },
    "here",
)
POLICIES = ("none", "selective", "full")
CHECKPOINTED = ("selective", "full", "offload")


def loss_of(policy, targets: Any = "all-linear", kept=1):
    """Returns the loss with its gradient, a function of the adapters, and the adapters."""
    loss, trainable = plain_loss_of(policy, targets, kept)
    return jax.jit(jax.value_and_grad(loss)), trainable


def pullback_of(policy, kept=1):
    """Returns the loss's pullback, in which is what the backward pass keeps."""
    return jax.vjp(*plain_loss_of(policy, kept=kept))[1]


def plain_loss_of(policy, targets: Any = "all-linear", kept=1):
    options: dict[str, Any] = {"gradient_checkpointing": policy, "kept_layers": kept}
    # Asked for at each call, so that `in_float64` decides it.
    options |= {"dtype": jnp.float32, "param_dtype": jnp.float32}
    model = CausalLM(CONFIG, rngs=nnx.Rngs(0), **options)
    # Larger than at birth, so that attention is far from uniform and its gradient not tiny.
    model = jax.tree.map(lambda x: x if x.ndim == 1 else 5 * x, model)
    settings = LoraConfig(r=4, target_modules=targets, init_lora_weights="gaussian")
    model = apply_lora(model, settings, rngs=nnx.Rngs(1))
    graph, trainable, frozen = split_trainable(model)
    # B begins at zero, where most gradients are zero too.
    trainable = jax.tree.map(lambda leaf: leaf + 0.05, trainable)
    draw = np.random.default_rng(0)
    tokens = jnp.asarray(draw.integers(0, 96, (ROWS, LENGTH)), jnp.int32)
    batch = {"input_ids": tokens, "labels": tokens}

    def loss(trainable):
        return causal_lm_loss(nnx.merge(graph, trainable, frozen, copy=True), batch)[0]

    return loss, trainable


def kept_shapes(pull):
    return [leaf.shape for leaf in jax.tree.leaves(pull) if hasattr(leaf, "shape")]


def count_products(function, argument):
    found = equations(jax.make_jaxpr(function)(argument).jaxpr)
    return sum(equation.primitive.name == "dot_general" for equation in found)


TARGETS = {"all": "all-linear", "two": ["q_proj", "up_proj"], "one": ["down_proj"]}
MORE_CASES = [("two", 1), ("one", 1), ("two", 2), ("one", 0)]


@functools.cache
def without_recomputation(targets):
    """Returns the loss and its gradient, in float64."""
    with in_float64():
        function, trainable = loss_of("none", TARGETS[targets])
        return function(trainable)


@pytest.mark.parametrize("policy", CHECKPOINTED)
@pytest.mark.parametrize(
    "targets, kept",
    [
        ("all", 1),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_CASES),
    ],
)
def test_every_policy_computes_the_same(policy, kept, targets):
    # In float32 the gradient of the last queries, 1e-4 of the others, is 4e-4 off by rounding.
    expected = without_recomputation(targets)
    with in_float64():
        function, trainable = loss_of(policy, TARGETS[targets], kept)
        found = function(trainable)
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert ours.dtype == np.float64 and np.linalg.norm(theirs) > 0
        assert distance(ours, theirs) <= EXACT


def test_selective_keeps_neither_the_norms_outputs_nor_the_inner_activation():
    counts = {p: kept_shapes(pullback_of(p)) for p in POLICIES}
    inner = {p: sum(np.prod(s) == ROWS * LENGTH * INNER for s in counts[p]) for p in POLICIES}
    # gate(x) and up(x) per layer; the product of both is made again by the layer that needs it
    assert inner == {"none": 2 * LAYERS, "selective": 2 * LAYERS, "full": 2}  # the last layer's
    size = lambda p: sum(int(np.prod(s)) for s in counts[p])
    tokens = ROWS * LENGTH
    saved = LAYERS * tokens * (2 * WIDTH + INNER)
    assert size("none") - size("selective") >= saved
    assert size("full") < size("selective") - REPEATED * tokens * 2 * INNER


@pytest.mark.parametrize("policy", ["full", "offload"])
def test_kept_layers_are_not_made_again(policy):
    counts = [count_products(*loss_of(policy, kept=k)) for k in range(LAYERS + 1)]
    assert [counts[k] - counts[-1] for k in range(LAYERS + 1)] == [14 * n for n in (3, 2, 1, 0)]
    assert counts[-1] == count_products(*loss_of("selective"))


@pytest.mark.parametrize("kept", [-1, LAYERS + 1, True, 1.0])
def test_a_model_keeps_no_more_layers_than_it_has(kept):
    with pytest.raises(ValueError, match=f"kept_layers must be 0 to the model's {LAYERS} layers"):
        CausalLM(CONFIG, gradient_checkpointing="full", kept_layers=kept, rngs=nnx.Rngs(0))


def test_nor_once_it_is_made():
    model = CausalLM(CONFIG, gradient_checkpointing="offload", rngs=nnx.Rngs(0))
    model.kept_layers = LAYERS + 1
    with pytest.raises(ValueError, match=f"kept_layers must be 0 to the model's {LAYERS} layers"):
        model(jnp.ones((1, 4), jnp.int32))


def test_what_is_made_again_reads_as_it_is_written():
    for choice in (Recomputation("none"), Recomputation("full"), Recomputation("offload", 7)):
        assert Recomputation.read(str(choice)) == choice
        settings = dict(pair.split("=") for pair in choice.as_settings.split())
        assert settings["train.gradient_checkpointing"] == choice.policy
        kept = {"none": "null", "full": "1", "offload": "7"}[choice.policy]
        assert settings["train.kept_layers"] == kept
        model = CausalLM(CONFIG, rngs=nnx.Rngs(0))
        choice.put_on(model)
        assert Recomputation.of(model) == choice
    assert str(Recomputation("offload", 7)) == "offload with 7 layers kept"
    assert str(Recomputation("selective", 7)) == "selective"  # which makes no layer again
    other = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    assert Recomputation.of(other) == Recomputation("none")
    other.gradient_checkpointing = True  # means something else there
    assert Recomputation.of(other) == Recomputation("none")


def test_selective_repeats_no_product_and_full_those_of_all_layers_but_the_last():
    counts = {policy: count_products(*loss_of(policy)) for policy in POLICIES}
    assert counts["selective"] == counts["none"]
    # Of each: q, k, v, o, gate, up and their updates, and two of attention; x·A is kept.
    assert counts["full"] == counts["none"] + 14 * REPEATED


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_offload_keeps_on_the_device_what_full_keeps_but_the_layers_inputs(kept):
    kinds = {}
    for policy in ("full", "offload"):
        leaves = jax.tree.leaves(pullback_of(policy, kept=kept))
        inputs = [leaf for leaf in leaves if leaf.shape == (ROWS, LENGTH, WIDTH)]
        kinds[policy] = sorted(leaf.sharding.memory_kind for leaf in inputs)
    device = jax.devices()[0].default_memory().kind
    assert set(kinds["full"]) == {device}
    # Of the layers that are made again; the last one's backward pass comes first.
    host = [kind for kind in kinds["offload"] if kind == "pinned_host"]
    assert len(host) == LAYERS - max(kept, 1)
    assert len(kinds["offload"]) == len(kinds["full"])


def test_a_layer_that_does_not_keep_its_input_cannot_be_offloaded():
    layers = [nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(2)]
    run = lambda layer, x, context: 2 * x
    x = jnp.ones((1, 2, 4))
    with pytest.raises(ValueError, match="does not keep its input"):
        jax.grad(lambda x: run_in_order([run] * 2, layers, x, None, offloaded=1).sum())(x)
