"""The tiny set-ups that tests share: sizes of models, the shipped one, an edit of a JSON file."""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

TINY = Path(__file__).parents[1] / "examples" / "tiny"
"""The shipped model, and the rows of the demo."""

SMALL: dict[str, Any] = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
"""Fields of a config.json, as every family has them."""

LLAMA = SMALL | dict(
    model_type="llama", vocab_size=64, max_position_embeddings=512, tie_word_embeddings=False
)
"""The whole config.json of a model that is trained."""


@functools.cache
def shallow_model(layers: int = 2) -> Path:
    """Returns a folder with the first layers of the shipped model, whose steps compile sooner.

    For runs whose answers do not matter; the folder is gone when the process ends.
    """
    home = Path(tempfile.mkdtemp(prefix="lorax-tests-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    folder = Path(shutil.copytree(TINY / "model", home / "model"))
    edit_json(folder / "config.json", num_hidden_layers=layers)
    weights, cut = folder / "model.safetensors", range(layers, 4)
    tensors = load_file(weights)
    kept = [n for n in tensors if not n.startswith(tuple(f"model.layers.{i}." for i in cut))]
    save_file({name: tensors[name] for name in kept}, weights, metadata={"format": "pt"})
    return folder


def write_model(folder: Path) -> Path:
    """Writes a model of two small layers, its weights random, with the shipped tokenizer."""
    from flax import nnx

    from lorax.interop.save import save_model
    from lorax.models.decoder import CausalLM
    from lorax.models.families import read_architecture

    architecture = read_architecture(LLAMA | {"vocab_size": 512}, "small")
    model = CausalLM(architecture, rngs=nnx.Rngs(0))
    return save_model(model, folder, source_directory=TINY / "model")


def edit_json(path: Path, **changes: Any) -> None:
    """Sets fields of the object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
