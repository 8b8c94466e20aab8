"""What `make_train_step` and its step are given: refused by name where nothing would train."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import lorax
from lorax.models.decoder import CausalLM
from lorax.models.families import read_architecture
from tests.tiny import LLAMA


@pytest.fixture(scope="module")
def model():
    base = CausalLM(read_architecture(LLAMA, "here"), rngs=nnx.Rngs(0))
    return lorax.apply_lora(base, lorax.LoraConfig(r=2), rngs=1)


def test_merged_adapters_train_nothing_and_are_refused(model):
    merged = lorax.merge_lora(model, keep_adapters=True)
    with pytest.raises(ValueError, match=r"14 layers are merged, model\.layers\.0.* unmerge_lora"):
        lorax.make_train_step(merged, optax.sgd(0.1))
    lorax.make_train_step(lorax.unmerge_lora(merged), optax.sgd(0.1))


def test_a_batch_without_micro_batches_is_refused_by_name(model):
    step, state = lorax.make_train_step(model, optax.sgd(0.1))
    ids = jnp.ones((2, 8), jnp.int32)
    batch = {"input_ids": ids, "labels": ids}
    with pytest.raises(ValueError, match=r"input_ids of a micro-batch .* the shape \(8,\); .*None"):
        step(state, batch)
    step, state = lorax.make_train_step(model, optax.sgd(0.1))
    _, metrics = step(state, jax.tree.map(lambda x: x[None], batch))  # the remedy
    assert metrics["tokens"] == 16
