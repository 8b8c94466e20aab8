"""A larger vocabulary, against transformers' resizing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import AutoModelForCausalLM

import lorax
from lorax.interop.load import load_model
from lorax.models.decoder import init_model
from lorax.models.families import read_architecture
from tests.tiny import SMALL

IDS = jax.random.randint(jax.random.key(0), (2, 9), 0, SMALL["vocab_size"])
NEW = 64


def make(tied):
    config = SMALL | {"model_type": "llama", "tie_word_embeddings": tied}
    return init_model(read_architecture(config, "here"), dtype=jnp.float32, seed=1)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
def test_it_is_what_transformers_makes_of_it(tied, tmp_path):
    base = make(tied)
    lorax.save_model(base, tmp_path / "base", dtype=jnp.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs.resize_token_embeddings(NEW)  # draws around the mean, within 1e-4
    ours = lorax.resize_vocabulary(base, NEW)
    ids = IDS.at[0, 3].set(NEW - 1)
    expected = theirs(torch.from_numpy(np.array(ids)).long()).logits.detach().numpy()
    np.testing.assert_allclose(ours(ids), expected, atol=1e-3)
    np.testing.assert_array_equal(ours(IDS)[..., : SMALL["vocab_size"]], base(IDS))
    lorax.save_model(ours, tmp_path / "ours", dtype=jnp.float32)
    again = load_model(tmp_path / "ours", dtype=jnp.float32)
    np.testing.assert_array_equal(again(ids), ours(ids))


def test_its_new_tokens_train():
    model = lorax.resize_vocabulary(make(False), NEW)
    tokens = list(range(SMALL["vocab_size"], NEW))
    config = lorax.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": tokens, "lm_head": tokens},
    )
    adapted = lorax.apply_lora(model, config, rngs=0)
    ids = IDS.at[0, 3].set(NEW - 1)
    np.testing.assert_array_equal(adapted(ids), model(ids))
    merged = lorax.merge_lora(adapted)
    assert merged.model.embed_tokens.embedding.shape == (NEW, SMALL["hidden_size"])
    np.testing.assert_allclose(merged(ids), model(ids), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_resized_is_refused():
    model = make(False)
    with pytest.raises(ValueError, match="size must be at least the model's 61 tokens, got 60"):
        lorax.resize_vocabulary(model, 60)
    config = lorax.LoraConfig(r=2, target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match=r"model\.embed_tokens carries an adapter: resize the ba"):
        lorax.resize_vocabulary(lorax.apply_lora(model, config, rngs=0), NEW)
    with pytest.raises(TypeError, match=r"model must be a lorax\.CausalLM"):
        lorax.resize_vocabulary(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), NEW)
