"""Tokenizers of Llama 2's kind, written into a folder."""

import itertools
import json

import tokenizers
from tokenizers import decoders, pre_tokenizers

NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


LLAMA = {**NAMED, "add_bos_token": True, "tokenizer_class": "LlamaTokenizer"}


SENTENCES = [
    "the cat sat on the mat and the dog ran to the tree",
    "a cat and a dog: one sat, the other ran   and   ran",
    "user assistant system the answer is 42, not 4711 or 12",
    "there the then them tree three  the  cat's mat, the dog's tree",
]


def write_folder(folder, *, backend=None, model=None, model_type="llama", **settings):
    """Writes a tokenizer's folder and returns its path."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if backend is not None:
        backend.save(str(folder / "tokenizer.json"))
    if model is not None:
        (folder / "tokenizer.model").write_bytes(model)
    return str(folder)


def byte_level(*before, **settings):
    """A byte-level tokenizer with a few merges and `before` in front of its pre-tokenizer."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a, b in itertools.product("0123456789", repeat=2)]
    vocab = {piece: i for i, piece in enumerate([*symbols, *map("".join, pairs), "<|end|>"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, pairs))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, **settings)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*before, level]) if before else level
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    return backend
