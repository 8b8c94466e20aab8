"""Bad outputs and machines: one readable message, exit code 2, and nothing written or changed."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.cli.damage import Q0, edit_config, edit_json, edit_weights

pytestmark = pytest.mark.slow


OUTPUTS = {
    "with something in it": (
        "full",
        r"save.output_dir: full exists and is not an empty folder; choose another",
    ),
    "that is a file": ("rows.jsonl", r"rows.jsonl exists and is not an empty folder"),
    "below a file": (
        "rows.jsonl/run",
        r"rows.jsonl/run would lie below /.*rows.jsonl, a file; choose another path",
    ),
    "of a long name": (
        5000 * "a",
        r"save.output_dir: a{100}… \([\d,]+ characters more\): File name too long; choose another",
    ),
    "of a long path": (
        "run/" + 50 * f"{100 * 'a'}/",
        r"save.output_dir: run/a.*… \([\d,]+ characters more\): File name too long; choose another",
    ),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_an_output_folder_that_cannot_be_made_is_refused_before_the_run_too(here, refused, kind):
    name, pattern = OUTPUTS[kind]
    (here / "full").mkdir()
    (here / "full" / "notes.txt").write_text("mine")
    asked = ("run.yaml", f"save.output_dir={name}")
    trained, validated = (refused(pattern, c, *asked) for c in ("train", "validate"))
    assert trained.removeprefix("lorax train") == validated.removeprefix("lorax validate")


def test_more_devices_than_there_are_are_refused(refused):
    refused(
        r"mesh.data asks for 64 devices and JAX sees \d+ .*; set it to at most \d+, or to -1",
        "train",
        "run.yaml",
        "mesh.data=64",
    )


def test_cudnn_without_a_gpu_is_refused(refused):
    refused(
        r"attn_impl='cudnn' cannot run here: .*; set it to auto or xla",
        "train",
        "run.yaml",
        "model.attn_impl=cudnn",
        "model.dtype=bfloat16",
    )


def test_a_base_that_overflows_the_dtype_is_refused(base, here, refused):
    folder = Path(shutil.copytree(base, here / "model"))
    edit_weights(lambda tensors: tensors[Q0].fill(1e6))(folder)
    refused(
        rf"{re.escape(Q0)} overflows float16; load it as bfloat16 or float32",
        "train",
        "run.yaml",
        f"model.name_or_path={folder}",
        "model.dtype=float16",
    )


def test_tensorboard_that_is_not_installed_is_refused(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    refused(
        r"which is not installed: pip install 'lorax-train\[tensorboard\]', or remove it from log",
        "train",
        "run.yaml",
        "log.report_to=[jsonl, tensorboard]",
    )


def test_answers_that_nothing_ends_are_refused(base, here, refused):
    folder = Path(shutil.copytree(base, here / "model"))
    edit_config(eos_token_id=None)(folder)
    (folder / "generation_config.json").unlink()
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    refused(
        r"neither generation_config.json, config.json nor the tokenizer has an eos_token_id",
        "train",
        "run.yaml",
        f"model.name_or_path={folder}",
        "data.eval=rows.jsonl",
        "data.train_on_eos=none",
        "eval.exact_match=true",
        "train.gradient_checkpointing=none",
    )
