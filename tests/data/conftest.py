"""Rows encoded under given settings, and a tokenizer of bytes with a template."""

import json

import pytest
import tokenizers
import transformers

from lorax.config.data import DataConfig, DataSource
from lorax.data.encode import load_encoded_dataset
from tests.chats import (
    CHATML,
    byte_tokenizer,
)
from tests.data.loaded import CHAT


@pytest.fixture
def encode(tmp_path):
    """Encodes rows under given settings; returns the dataset."""

    def run(rows, template=CHATML, *, name="rows.jsonl", source=None, tokenizer=None, **settings):
        path = tmp_path / name
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text)
        config = DataConfig(train=(DataSource(path=str(path), **(source or {})),), **settings)
        tokenizer = tokenizer or byte_tokenizer(template)
        return load_encoded_dataset(config.train, config, tokenizer)

    return run


@pytest.fixture
def encode_with(tmp_path):
    """Encodes rows under given settings; returns the dataset."""

    def run(rows, tokenizer, vocab_size=None, **settings):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = DataConfig(train=(DataSource(path=str(path)),), **settings)
        return load_encoded_dataset(config.train, config, tokenizer, vocab_size=vocab_size)

    return run


@pytest.fixture(scope="module")
def tokenizer():
    symbols = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({s: i for i, s in enumerate(symbols)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    found.chat_template = CHAT
    return found
