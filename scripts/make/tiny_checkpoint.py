"""Makes the demo's base model: a tokenizer, a random tiny Llama, and lorax's own pre-training.

    python -m scripts.make.tiny_data examples/tiny/data
    python -m scripts.make.tiny_checkpoint examples/tiny/model

Trains from scratch with `configs/tiny_pretrain.yaml` (``method: full``) in two rounds, about ten
minutes on two CPU cores, and writes the result as a Hugging Face checkpoint.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import jax.numpy as jnp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lorax.cli.main import main as lorax_main
from lorax.interop.save import save_model
from lorax.models.decoder import init_model
from lorax.models.families import read_architecture

ROOT = Path(__file__).parents[2]
DATA = ROOT / "examples" / "tiny" / "data"
VOCABULARY = 512
ROUNDS: tuple[list[str], ...] = ([], ["train.num_train_epochs=2", "train.learning_rate=1e-3"])
"""Settings of each round of pre-training that differ from the config; the second warms up again."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ARCHITECTURE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
}


def make_tokenizer(files: list[Path]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE on the conversations; every digit is a token of its own."""
    messages = [
        message["content"]
        for file in files
        for line in file.read_text(encoding="utf-8").splitlines()
        for message in json.loads(line)["messages"]
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(messages, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def main() -> None:
    """Builds the untrained checkpoint in a temporary folder, pre-trains it, moves the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    if directory.exists():
        raise SystemExit(f"{directory} exists; remove it first to make it anew")
    with tempfile.TemporaryDirectory() as scratch:
        untrained = Path(scratch) / "untrained"
        tokenizer = make_tokenizer([DATA / "pretrain.jsonl"])
        config = ARCHITECTURE | {
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
        }
        model = init_model(
            read_architecture(config, "tiny_checkpoint.py"), dtype=jnp.float32, seed=3407
        )
        tokenizer.save_pretrained(Path(scratch) / "tokenizer")
        (Path(scratch) / "tokenizer" / "generation_config.json").write_text(
            json.dumps(
                {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
            )
        )
        save_model(
            model, untrained, dtype=jnp.float32, source_directory=Path(scratch) / "tokenizer"
        )
        trained = untrained
        for number, overrides in enumerate(ROUNDS):
            run = Path(scratch) / f"run-{number}"
            words = [f"model.name_or_path={trained}", f"save.output_dir={run}", *overrides]
            if code := lorax_main(["train", str(ROOT / "configs" / "tiny_pretrain.yaml"), *words]):
                raise SystemExit(code)
            trained = run / "merged"
        shutil.copytree(trained, directory, ignore=shutil.ignore_patterns("README.md"))
    print(f"wrote {directory}")


if __name__ == "__main__":
    main()
