"""The sound inputs that cases change: a small model, rows of every format, an adapter, runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

TINY = Path(__file__).parents[2] / "examples" / "tiny" / "model"
"""Where the tokenizer is taken from."""

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "torch_dtype": "float32",
    "transformers_version": "4.44.0",
}
GENERATION = {"eos_token_id": [2], "pad_token_id": 0, "do_sample": False, "temperature": 0.7}
TOKENIZER_SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": 256,
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": "<|pad|>",
    "add_bos_token": False,
    "add_eos_token": False,
    "padding_side": "right",
    "clean_up_tokenization_spaces": False,
    "additional_special_tokens": ["<|im_start|>"],
    "added_tokens_decoder": {
        str(i): {"content": text, "special": True, "normalized": False, "lstrip": False,
                 "rstrip": False, "single_word": False}
        for i, text in enumerate(("<|pad|>", "<|im_start|>", "<|im_end|>"))
    },
}  # fmt: skip
SPECIAL_TOKENS = {"eos_token": "<|im_end|>", "pad_token": {"content": "<|pad|>", "lstrip": False}}

SETTINGS: dict[str, Any] = {
    "model": {"name_or_path": "model", "revision": None, "adapter": None, "dtype": "float32"},
    "lora": {
        "r": 4,
        "lora_alpha": 8.0,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": None,
        "layers_to_transform": None,
        "rank_pattern": {},
        "alpha_pattern": {"v_proj": 4.0},
        "use_rslora": False,
        "bias": "none",
        "init_lora_weights": True,
        "modules_to_save": None,
    },
    "data": {
        "train": "rows.jsonl",
        "eval": [{"path": "held.jsonl", "split": "train[:2]"}],
        "format": "auto",
        "chat_template": "tokenizer",
        "loss_on": "assistant",
        "train_on_eos": "turn",
        "max_seq_length": 128,
        "overlong": "error",
        "unsupervised": "error",
        "packing": False,
        "shuffle": True,
    },
    "train": {
        "max_steps": 3,
        "num_train_epochs": 1.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
        "weight_decay": 0.01,
        "optim": "adamw",
        "adam_beta1": 0.9,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": "none",
        "seed": 7,
    },
    "eval": {"strategy": "no", "steps": 100, "exact_match": False, "max_new_tokens": 8},
    "save": {"output_dir": "run", "save_steps": 1, "save_total_limit": 3, "export": ["peft"]},
    "log": {"logging_steps": 1, "report_to": ["jsonl"]},
    "mesh": {"data": 1},
}


def _talk(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def _rows() -> dict[str, list[dict[str, Any]]]:
    """Rows by format. Every word of theirs begins with zq, to be known where it must not be."""
    asked = [f"Zqask{i} zqthe zqcolour?" for i in "abcd"]
    said = [f"Zqsay{i}, zqgreen." for i in "abcd"]
    pairs = list(zip(asked, said, strict=True))
    talks = [_talk(("user", a), ("assistant", b)) for a, b in pairs]
    talks[1] = _talk(("system", "Zqsystem zqterse"), *((m["role"], m["content"]) for m in talks[1]))
    talks[2] += _talk(("user", "Zqagain?"), ("assistant", "Zqonce zqmore"))
    human = {"user": "human", "assistant": "gpt", "system": "system"}
    return {
        "messages": [{"messages": talk} for talk in talks],
        "sharegpt": [
            {"conversations": [{"from": human[m["role"]], "value": m["content"]} for m in talk]}
            for talk in talks
        ],
        "alpaca": [{"instruction": a, "input": "Zqinput" * (i % 2), "output": b}
                   for i, (a, b) in enumerate(pairs)],
        "prompt": [{"prompt": a, "completion": " " + b} for a, b in pairs],
        "talk": [{"prompt": talk[:-1], "completion": talk[-1:]} for talk in talks],
        "text": [{"text": f"{a} {b}"} for a, b in pairs],
        "ids": [{"input_ids": [5, 6, 7, 8 + i], "labels": [-100, -100, 7, 8 + i]}
                for i in range(4)],
    }  # fmt: skip


TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
        "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "header": (
        "{%- set ns = namespace(n=0) %}{%- for m in messages %}{%- set ns.n = ns.n + 1 %}"
        "{{- '<|im_start|>' + m.role + '\\n\\n' + m.content | trim + eos_token }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n\\n' }}{%- endif %}"
    ),
    "inst": (
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\\n' %}"
        "{% set loop_messages = messages[1:] %}{% else %}{% set system = '' %}"
        "{% set loop_messages = messages %}{% endif %}{% for m in loop_messages %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ '[INST] ' + (system if loop.first else '') + "
        "m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "blocks": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}"
        "<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}


def make(garden: Path) -> None:
    """Writes the folders that cases are copied from; trains a run, so it needs lorax."""
    rows = _rows()
    _make_plain(garden / "plain", rows["messages"])
    for name, lines in rows.items():
        folder = _copy(garden, f"rows-{name}")
        _write_lines(folder / "rows.jsonl", lines)
        data = {"train": "rows.jsonl", "max_seq_length": 128}
        data |= {"loss_on": "all"} if name == "text" else {}
        _write_settings(folder, SETTINGS | {"data": data})
    for name, text in TEMPLATES.items():
        folder = _copy(garden, f"template-{name}")
        (folder / "chat.jinja").write_text(text)
        data = SETTINGS["data"] | {"chat_template": "chat.jinja", "eval": []}
        data |= {"loss_on": "last_assistant"} if name == "inst" else {}
        _write_settings(folder, SETTINGS | {"data": data})
    _shard(_copy(garden, "sharded") / "model")
    _train(_copy(garden, "run"))
    folder = _copy(garden, "adapter")
    shutil.copytree(garden / "run" / "run" / "adapter", folder / "adapter")
    short = {key: value for key, value in SETTINGS.items() if key != "lora"}
    _write_settings(folder, short | {"model": SETTINGS["model"] | {"adapter": "adapter"}})
    folder = garden / "cut"
    shutil.copytree(garden / "run", folder)
    for each in ("adapter", "checkpoints/step-000000003", "summary.json", "loss.png"):
        path = folder / "run" / each
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _make_plain(folder: Path, rows: list[Any]) -> None:
    model = folder / "model"
    model.mkdir(parents=True)
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(TINY / name, model)
    files = {
        "config.json": CONFIG,
        "generation_config.json": GENERATION,
        "tokenizer_config.json": TOKENIZER_SETTINGS,
        "special_tokens_map.json": SPECIAL_TOKENS,
    }
    for name, content in files.items():
        (model / name).write_text(json.dumps(content))
    save_file(weights(), model / "model.safetensors", metadata={"format": "pt"})
    _write_lines(folder / "rows.jsonl", rows)
    _write_lines(folder / "held.jsonl", rows[:3])
    _write_settings(folder, SETTINGS)


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(0, 0.02, shape).astype(np.float32)
    found = {"model.embed_tokens.weight": draw(512, 32), "lm_head.weight": draw(512, 32)}
    found["model.norm.weight"] = np.ones(32, np.float32)
    shapes = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32),
              "self_attn.v_proj": (16, 32), "self_attn.o_proj": (32, 32),
              "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32),
              "mlp.down_proj": (32, 48)}  # fmt: skip
    for i in range(2):
        found |= {f"model.layers.{i}.{name}.weight": draw(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{i}.{norm}.weight"] = np.ones(32, np.float32)
    return found


def _shard(model: Path) -> None:
    (model / "model.safetensors").unlink()
    parts, found = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)], weights()
    names = {name: parts["layers.1" in name] for name in found}
    for part in parts:
        save_file({n: found[n] for n in found if names[n] == part}, model / part)
    size = sum(value.nbytes for value in found.values())
    index = {"metadata": {"total_size": size}, "weight_map": names}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def _train(folder: Path) -> None:
    import os

    from lorax.cli.main import main

    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["train", "run.yaml"]) == 0
    finally:
        os.chdir(before)


def _copy(garden: Path, name: str) -> Path:
    return Path(shutil.copytree(garden / "plain", garden / name))


def _write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_settings(folder: Path, settings: dict[str, Any]) -> None:
    from tests.fuzz import structure

    (folder / "run.yaml").write_text(structure.dump_yaml(structure.keyed(settings)).lstrip())


if __name__ == "__main__":
    import sys

    make(Path(sys.argv[1]))
