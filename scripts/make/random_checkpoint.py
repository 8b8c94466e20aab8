"""Writes a Hugging Face checkpoint with random weights, to time and test sizes without a download.

    python -m scripts.make.random_checkpoint llama-8b OUT --tokenizer examples/tiny/model

The shapes are the published ones; the tokenizer is copied from a folder, since only its ids matter.
"""

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lorax.interop.folder import TOKENIZER_FILES, write_checkpoint
from lorax.interop.tensors import tensor_table
from lorax.models.architecture import DecoderConfig
from lorax.models.families import read_architecture

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "vocab_size": 128256,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
SHAPES = {
    "llama-1b": LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "llama-8b": LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "qwen2.5-7b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 32768,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
    },
}


def random_tensors(config: DecoderConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every tensor: norms 1, biases 0, matrices normal with deviation 0.02."""
    draw = jax.jit(
        lambda key, shape: (0.02 * jax.random.normal(key, shape)).astype(jnp.bfloat16),
        static_argnums=1,
    )
    for index, (name, spec) in enumerate(tensor_table(config).items()):
        if len(spec.shape) == 1:
            value = jnp.full(spec.shape, 0.0 if name.endswith("bias") else 1.0, jnp.bfloat16)
        else:
            value = draw(jax.random.fold_in(jax.random.key(0), index), spec.shape)
        yield name, np.asarray(value)


def main() -> None:
    """Writes the checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", choices=tuple(SHAPES))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parsed = parser.parse_args()
    raw = SHAPES[parsed.shape]
    config = read_architecture(raw, "random_checkpoint.py")
    write_checkpoint(random_tensors(config), raw | {"dtype": "bfloat16"}, parsed.directory)
    for name in TOKENIZER_FILES:
        if (parsed.tokenizer / name).is_file():
            shutil.copyfile(parsed.tokenizer / name, parsed.directory / name)
    print(f"wrote {parsed.directory}")


if __name__ == "__main__":
    main()
