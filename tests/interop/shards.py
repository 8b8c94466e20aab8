"""A small checkpoint, split into shards."""

import json
from typing import Any

from safetensors.numpy import save_file

from lorax.interop.safetensors import read_tensors

SMALL: dict[str, Any] = dict(
    model_type="llama",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def split_into_shards(folder):
    """Turns a checkpoint of one file into two shards and an index, and returns the index."""
    path = folder / "model.safetensors"
    tensors = {name: value for _, name, value in read_tensors([path])}
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:5]}
    shards["model-00002-of-00002.safetensors"] = names[5:]
    for file, part in shards.items():
        save_file({n: tensors[n] for n in part}, folder / file)
    path.unlink()
    index = {"weight_map": {n: file for file, part in shards.items() for n in part}}
    write_index(folder, index)
    return index


def write_index(folder, index):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
