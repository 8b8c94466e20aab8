"""What the tests of bad input write, and how they damage it."""

import hashlib
import json
from pathlib import Path

from safetensors.numpy import save_file

from lorax.interop.safetensors import read_tensors
from tests.tiny import edit_json

TINY = Path(__file__).parents[2] / "examples" / "tiny" / "model"


Q0 = "model.layers.0.self_attn.q_proj.weight"


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 3416512\n"


CONFIG = """\
model:
  name_or_path: {model}
  dtype: float32
data:
  train: rows.jsonl
save:
  output_dir: run
"""


def conversation(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


GOOD_ROW = conversation(("user", "Hi"), ("assistant", "Ho"))


GOOD_ROWS = lines(*[GOOD_ROW] * 4)


def listing(folder):
    """Everything below a folder, with the hash of what each file holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        is_file = path.is_file() and not path.is_symlink()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if is_file else None
        found[str(path.relative_to(folder))] = content
    return found


def edit_tensors(path, change):
    tensors = {name: value for _, name, value in read_tensors([path])}
    change(tensors)
    save_file(tensors, path)


def edit_weights(change):
    return lambda folder: edit_tensors(folder / "model.safetensors", change)


def edit_config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)
