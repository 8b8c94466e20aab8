"""What the figures of speed are counted from."""

import jax.numpy as jnp
import pytest
from flax import nnx

import lorax
from lorax.adapters.nnx.adapter import cost_of
from lorax.adapters.nnx.tree import adapted_layers
from lorax.layers.linear import Linear
from lorax.models.decoder import CausalLM
from lorax.models.families import read_architecture
from lorax.training.events import model_size
from tests.int8 import store
from tests.tiny import LLAMA


@pytest.mark.parametrize("stored", [False, True])
def test_a_models_size_counts_matrices_and_adapters(stored):
    architecture = read_architecture(LLAMA, "here")
    base = CausalLM(architecture, rngs=nnx.Rngs(0))
    of_base = model_size(base)
    width, inner, vocabulary = 32, 48, 64
    layer = 2 * width * width + 2 * width * (width // 2) + 3 * width * inner
    assert of_base.trained_parameters == 2 * layer + width * vocabulary  # and the head
    adapted = lorax.apply_lora(base, lorax.LoraConfig(r=4), rngs=nnx.Rngs(1))
    if stored:
        for each in adapted_layers(adapted).values():
            assert isinstance(each, Linear)
            each.freeze(store(each.kernel.get_value().astype(jnp.float32)))
    size = model_size(adapted)
    assert size.frozen_parameters == of_base.trained_parameters
    costs = [cost_of(each).parameters for each in adapted_layers(adapted).values()]
    assert size.trained_parameters == sum(costs) > 0


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapted_table_counts_what_multiplies(tied):
    """Of a lookup the product with B alone; where it is the head too, with A as well."""
    architecture = read_architecture(LLAMA | {"tie_word_embeddings": tied}, "here")
    base = CausalLM(architecture, rngs=nnx.Rngs(0))
    config = lorax.LoraConfig(r=4, use_dora=True, target_modules=["embed_tokens"])
    size = model_size(lorax.apply_lora(base, config, rngs=nnx.Rngs(1)))
    assert size.frozen_parameters == model_size(base).trained_parameters
    assert size.trained_parameters == 4 * 32 + 4 * 64 * tied
