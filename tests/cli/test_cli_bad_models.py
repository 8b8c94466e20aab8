"""Bad checkpoints: one readable message, exit code 2, and nothing written or changed."""

import json
import os
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from lorax.cli.main import main
from lorax.interop.load import find_stored_dtype
from tests.cli.damage import LFS_POINTER, Q0, edit_config, edit_json, edit_weights

pytestmark = pytest.mark.slow


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def leave_only_a_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def write_index(file):
    def write(folder):
        (folder / "model.safetensors").unlink()
        index = {"weight_map": {Q0: file}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return write


def poison(tensors):
    tensors[Q0][0, 0] = np.nan


CONFIG_JSON = {
    "no config.json": (
        lambda folder: (folder / "config.json").unlink(),
        r"config.json does not exist, or is not a file",
    ),
    "config.json is a web page": (
        lambda folder: (folder / "config.json").write_text("<!DOCTYPE html><title>Sign in"),
        r"config.json is .*(HTML|web) page",
    ),
    "config.json is cut off": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "lla'),
        r"config.json is not JSON: .*line 1",
    ),
    "unknown model_type": (
        edit_config(model_type="mamba"),
        r"config.json: model_type must be one of llama, mistral, qwen2, qwen3, got 'mamba'",
    ),
    "unsupported rope type": (
        edit_config(rope_parameters=None, rope_scaling={"rope_type": "longrope", "factor": 4.0}),
        r"config.json: rope_scaling.rope_type must be one of default, linear, .*got 'longrope'",
    ),
    "unknown field": (
        edit_config(attention_bais=True),
        r"config.json: attention_bais=True is not a field .*nearest known field is attention_bias",
    ),
    "dtype of another type": (
        edit_config(dtype=16),
        r"config.json: dtype must be bfloat16, float16 or float32, .* or auto or absent, .*got 16",
    ),
    "dtype that is none": (
        edit_config(dtype=None, torch_dtype="float23"),
        r"config.json: torch_dtype must be bfloat16, float16 or float32, .*got 'float23'",
    ),
    "class that is not supported": (
        edit_config(architectures=["LlamaForSequenceClassification"]),
        r"config.json: architectures must be .* lorax reads: LlamaForCausalLM, MistralForCausalLM",
    ),
    "value of 20,000 characters": (
        edit_config(surprise="y" * 20_000),
        r"config.json: surprise='y{100}'… \(19,900 characters more\) is not a field",
    ),
    "config.json is null": (
        lambda folder: (folder / "config.json").write_text("null"),
        r"config.json must hold an object, got null",
    ),
    "config.json never begins": (
        lambda folder: [(folder / "config.json").unlink(), os.mkfifo(folder / "config.json")],
        r"config.json does not exist, or is not a file",
    ),
    "config.json of two MiB": (
        lambda folder: (folder / "config.json").write_text(" " * 2**21),
        r"config.json cannot be read: it has 2 MiB, where 1 would be much",
    ),
    "quantised weights": (
        edit_config(quantization_config={"quant_method": "gptq"}),
        r"config.json: quantization_config.quant_method must be bitsandbytes .*, got .gptq.",
    ),
    "heads that do not divide": (
        edit_config(num_key_value_heads=3),
        r"config.json: num_key_value_heads must divide num_attention_heads=4, got 3",
    ),
    "no tokenizer": (
        lambda folder: [p.unlink() for p in folder.glob("tokenizer*")],
        r"model: cannot load its tokenizer; needed is a tokenizer.json",
    ),
    "tokenizer.json is damaged": (
        lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0"'),
        r"model: cannot load its tokenizer; needed is a tokenizer.json",
    ),
    "tokenizer.json of a shape of its own": (
        lambda folder: (folder / "tokenizer.json").write_text("[]"),
        r"model: cannot load its tokenizer; needed is a tokenizer.json: TypeError",
    ),
    "tokenizer.json is a pointer": (
        lambda folder: (folder / "tokenizer.json").write_text(
            "version https://git-lfs.github.com/spec/v1\n"
        ),
        r"tokenizer.json is a Git LFS pointer, not the file itself",
    ),
    "no chat template": (
        lambda folder: (folder / "chat_template.jinja").unlink(),
        r"rows.jsonl:1: .*no chat template; set data.chat_template to the path of a .jinja",
    ),
    "chat template is no Jinja": (
        lambda folder: (folder / "chat_template.jinja").write_text("{% for m in messages %}"),
        r"the tokenizer's chat template: line 1: ",
    ),
}


@pytest.mark.parametrize("name", CONFIG_JSON)
def test_a_bad_model_folder_is_refused_before_weights_are_read(base, here, refused, name):
    damage, pattern = CONFIG_JSON[name]
    damage(Path(shutil.copytree(base, here / "model")))
    refused(pattern, "validate", "run.yaml", f"model.name_or_path={here / 'model'}")


def test_every_command_refuses_a_dtype_that_is_none(good_adapter, base, here, refused):
    folder = Path(shutil.copytree(base, here / "model"))
    edit_config(dtype="float23")(folder)
    expected = r"config.json: dtype must be bfloat16, float16 or float32.*got 'float23'"
    for command in ("validate", "inspect", "plan", "train"):
        refused(expected, command, "run.yaml", f"model.name_or_path={folder}")
    refused(expected, "generate", str(folder), "--prompt", "Hi")
    export = ["export", str(good_adapter), "--format", "merged", "--out", "out"]
    refused(expected, *export, "--base", str(folder))


@pytest.mark.parametrize("dtype", [None, "float32", "half"])
def test_a_dtype_that_says_nothing_new_is_good(base, here, capsys, dtype):
    folder = Path(shutil.copytree(base, here / "model"))
    edit_config(dtype=dtype, torch_dtype=None)(folder)
    assert main(["validate", "run.yaml", f"model.name_or_path={folder}"]) == 0
    assert find_stored_dtype(folder) == ("float16" if dtype == "half" else "float32")


def test_a_dtype_that_is_left_to_the_tensors_is_theirs(base, here):
    folder = Path(shutil.copytree(base, here / "model"))
    for dtype in ("auto", None):
        edit_config(dtype=dtype, torch_dtype=None)(folder)
        assert find_stored_dtype(folder) == "float32"
    halve = lambda t: t.update({name: value.astype(np.float16) for name, value in t.items()})
    edit_weights(halve)(folder)
    assert find_stored_dtype(folder) == "float16"


def test_what_changes_nothing_is_told_by_every_command(good_adapter, base, here, capsys):
    folder = Path(shutil.copytree(base, here / "model"))
    edit_config(unk_token_id=0, internal_version="7", sequence_parallel_enabled=False)(folder)
    model = f"model.name_or_path={folder}"
    adapter = Path(shutil.copytree(good_adapter, here / "adapter"))
    edit_json(adapter / "adapter_config.json", fan_in_fan_out=True)
    told = "unk_token_id=0 (a token id), internal_version='7' (text that names no computation)"
    for command in ("validate", "inspect", "plan"):
        assert main([command, "run.yaml", model]) == 0
        assert told in capsys.readouterr().out
    assert main(["validate", "run.yaml", model, f"model.adapter={adapter}"]) == 0
    assert "fan_in_fan_out is not read" in capsys.readouterr().out
    assert main(["generate", str(folder), "--prompt", "Hi", "--max-new-tokens", "1"]) == 0
    captured = capsys.readouterr()
    assert "unk_token_id" in " ".join(captured.err.split()) and "unk_token" not in captured.out


WEIGHTS = {
    "missing tensor": (
        edit_weights(lambda tensors: tensors.pop(Q0)),
        rf"model lacks {re.escape(Q0)}",
    ),
    "extra tensor": (
        edit_weights(lambda tensors: tensors.update({"extra.weight": np.zeros(2, np.float32)})),
        r"model.safetensors holds extra.weight, which a llama model .*does not have",
    ),
    "misshapen tensor": (
        edit_weights(lambda tensors: tensors.update({Q0: tensors[Q0][:64].copy()})),
        rf"{re.escape(Q0)} has shape \(64, 128\); config.json needs \(128, 128\)",
    ),
    "shape of another config": (
        edit_config(intermediate_size=256),
        r"has shape .*384.*; config.json needs .*256",
    ),
    "tensor that is not finite": (
        edit_weights(poison),
        rf"model.safetensors: {re.escape(Q0)} holds values that are not finite",
    ),
    "dtype that is not read": (
        edit_weights(lambda t: t.update({Q0: t[Q0].astype(ml_dtypes.float8_e4m3fn)})),
        r"has dtype F8_E4M3; lorax reads BF16, F16, F32: convert or dequantise",
    ),
    "truncated safetensors": (
        truncate,
        r"model.safetensors is not a whole safetensors file .*truncated: fetch it again",
    ),
    "Git LFS pointer": (
        lambda folder: (folder / "model.safetensors").write_text(LFS_POINTER),
        r"model.safetensors is a Git LFS pointer.*git lfs pull",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        r"model holds no model.safetensors; fetch the checkpoint's safetensors files",
    ),
    "only a pickle": (
        leave_only_a_pickle,
        r"only pytorch_model.bin: pickles can run code and are never loaded. Convert",
    ),
    "index that leaves the folder": (
        write_index("../other/model.safetensors"),
        r"weight_map\['model.layers.*'\] must be the bare name of a .safetensors file .*got '\.\.",
    ),
    "index of an absent shard": (
        write_index("model-00001-of-00002.safetensors"),
        r"index.json lists model-00001-of-00002.safetensors, which does not exist; fetch it",
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_bad_weights_are_refused_before_the_run_directory_is_made(base, here, refused, name):
    damage, pattern = WEIGHTS[name]
    damage(Path(shutil.copytree(base, here / "model")))
    readable = ["validate"] * (name != "tensor that is not finite")
    for command in (*readable, "train"):
        refused(pattern, command, "run.yaml", f"model.name_or_path={here / 'model'}")


def test_a_missing_model_folder_is_refused(refused):
    refused(r"\./absent: no such folder", "validate", "run.yaml", "model.name_or_path=./absent")


def test_a_hub_id_that_cannot_be_fetched_is_refused(refused):
    refused(
        r"nobody/nothing: no such folder in .*, and not to be had from the Hugging "
        r"Face hub: HF_HUB_OFFLINE is set, and no copy was fetched before: unset it, or name a fol",
        "validate",
        "run.yaml",
        "model.name_or_path=nobody/nothing",
    )


def test_a_file_as_model_is_refused(refused):
    refused(
        r"rows.jsonl is a file; give the folder that holds config.json",
        "validate",
        "run.yaml",
        "model.name_or_path=./rows.jsonl",
    )


def test_an_adapter_as_base_model_is_refused(good_adapter, refused):
    refused(
        r"holds a LoRA adapter, not a model; load the base model (?!BASE)(\S+), then give it the "
        r"adapter: `lorax generate \1 --adapter /",
        "validate",
        "run.yaml",
        f"model.name_or_path={good_adapter}",
    )
