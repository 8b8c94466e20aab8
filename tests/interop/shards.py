"""A small checkpoint, split into shards."""

import json

from safetensors.numpy import save_file

from lorax.interop.safetensors import read_tensors
from tests import tiny

SMALL = tiny.SMALL | dict(model_type="llama")


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
