"""A small checkpoint, a tiny base that transformers wrote, and an adapter of PEFT on it."""

import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorax.interop.load import load_model
from lorax.interop.save import save_model
from lorax.models.decoder import init_model
from lorax.models.families import read_architecture
from tests.interop.peft_adapters import peft_model, save, torch_logits, trained
from tests.interop.shards import SMALL


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("original") / "model"
    return save_model(init_model(read_architecture(SMALL, "here")), path)


@pytest.fixture
def folder(original, tmp_path):
    """A copy of a good checkpoint, to be damaged."""
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("base") / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def loaded_base(base):
    return load_model(base, dtype=jnp.float32)


@pytest.fixture(scope="session")
def plain(base, tmp_path_factory):
    """An adapter of PEFT, and its logits there."""
    model = trained(peft_model(base))
    return save(model, tmp_path_factory.mktemp("plain") / "adapter"), torch_logits(model)


@pytest.fixture
def adapter(plain, tmp_path):
    """A copy of it, to be changed."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in plain[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder
