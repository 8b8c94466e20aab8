"""Five real tokenizers: their ids are the tokenizers library's, their chats end where turns end."""

import functools
import json
from typing import Any

import pytest
import tokenizers

import lorax
from lorax.config.data import DataConfig, DataSource
from lorax.data.encode import load_encoded_dataset
from lorax.data.preview import render_example
from tests.real import TOKENIZERS, asset

pytestmark = pytest.mark.slow

TEXTS = {
    "nothing": "",
    "words": "Hello, world! It's what we'LL say.",
    "spaces": "  two,   three\t\ttabs and a trailing one ",
    "lines": "\n\na line\n  indented\r\n\r\n",
    "numbers": "12345 3.14 1,000,000 0x1F 2026-11-30",
    "code": "def f(x):\n\treturn x ** 2  # squared\n",
    "accents": "naïve café, Ünïcödé, cafe\u0301, ﬁ Å ①",
    "Japanese": "日本語のテキスト、カタカナ。",
    "Cyrillic": "Привет, мир! Ёлка.",
    "Arabic": "مرحبا بالعالم ١٢٣",
    "Hindi": "नमस्ते दुनिया",
    "emoji": "🙂 👩‍👩‍👧‍👦 🇫🇷 👍🏽",
    "odd spaces": "a\u00a0b\u2003c\u200bd\ufeffe",
    "control characters": "\x00\x07\x7f",
    "meta symbols": "▁under Ġbyte Ċ <0x0A>",
    "Llama 3's tokens": "<|begin_of_text|><|end_header_id|>\n\nhi<|eot_id|> a",
    "ChatML's tokens": "<|im_start|>user\nhi <|im_end|>\n  <|im_end|><|endoftext|>",
    "Gemma's tokens": "<bos><start_of_turn>user\nhi <end_of_turn>\n  <eos> x",
    "Llama 2's tokens": "<s>[INST] hi [/INST] a</s> <s> b",
}
USER, REPLY = {"role": "user", "content": "Hi, né 🙂?"}, "Salut\n  ça va, 日本"
CHATS = {
    "one turn": [USER, {"role": "assistant", "content": REPLY}],
    "two turns": [
        USER,
        {"role": "assistant", "content": "42"},
        USER,
        {"role": "assistant", "content": REPLY},
    ],
    "system": [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": REPLY},
    ],
}
# What ends a turn, and what the template itself writes before the reply.
STOPS = {
    "llama3": ("", "<|eot_id|>"),
    "llama3_1": ("", "<|eot_id|>"),
    "qwen3": ("<think>\n\n</think>\n\n", "<|im_end|>"),
    "gemma3": ("", "<end_of_turn>"),
}


@functools.cache
def tokenizer(name) -> Any:
    return lorax.load_tokenizer(str(asset(name)))


@functools.cache
def oracle(name) -> Any:
    return tokenizers.Tokenizer.from_file(str(asset(name) / "tokenizer.json"))


def encode(name, messages, folder, **settings):
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    config = DataConfig(train=(DataSource(path=str(path)),), **settings)
    return load_encoded_dataset(config.train, config, tokenizer(name))


@pytest.mark.filterwarnings("ignore:.*takes the token ids that its own files give")
@pytest.mark.parametrize("name", TOKENIZERS)
def test_it_loads_and_gives_a_text_back(name):
    ids = tokenizer(name)("Hello, né 🙂 日本!", add_special_tokens=False)["input_ids"]
    assert tokenizer(name).decode(ids) == "Hello, né 🙂 日本!"


@pytest.mark.parametrize("special", [False, True], ids=["bare", "with special tokens"])
@pytest.mark.parametrize("name", STOPS)
def test_ids_are_those_of_the_tokenizers_library(name, special):
    for about, text in TEXTS.items():
        found = tokenizer(name)(text, add_special_tokens=special)["input_ids"]
        assert found == oracle(name).encode(text, add_special_tokens=special).ids, about


@pytest.mark.parametrize("about", CHATS)
@pytest.mark.parametrize("name", STOPS)
def test_a_chat_is_its_template_tokenized_once_and_its_last_turn_is_learned(name, about, tmp_path):
    messages = CHATS[about]
    encoded = encode(name, messages, tmp_path, loss_on="last_assistant")
    text: Any = tokenizer(name).apply_chat_template(messages, tokenize=False)
    assert encoded.tokens.tolist() == oracle(name).encode(text, add_special_tokens=False).ids
    opening, stop = STOPS[name]
    learned = [text for text, flag in render_example(encoded, 0, tokenizer(name)) if flag]
    assert learned == [opening + REPLY + stop]


@pytest.mark.parametrize("name", STOPS)
def test_every_turn_of_a_chat_is_learned_up_to_its_stop_token(name, tmp_path):
    encoded = encode(name, CHATS["two turns"], tmp_path)
    rows = [render_example(encoded, row, tokenizer(name)) for row in range(len(encoded))]
    opening, stop = STOPS[name]
    learned = [text for pieces in rows for text, flag in pieces if flag]
    assert learned == [opening + "42" + stop, opening + REPLY + stop]
