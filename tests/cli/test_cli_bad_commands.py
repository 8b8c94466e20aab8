"""Bad arguments of the other commands: one readable message, exit code 2, nothing written."""

import io
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest

from tests.cli.damage import edit_json, lines

pytestmark = pytest.mark.slow


def test_generate_refuses_what_it_cannot_do(base, refused):
    model = str(base)
    for arguments, pattern in (
        (["--temperature", "-1"], r"--temperature must be 0 \(greedy\) or positive, got -1"),
        (["--top-p", "0.9"], r"--top-p chooses among samples: set a temperature above 0"),
        (["--top-k", "0", "--temperature", "1"], r"--top-k must be at least 1, got 0"),
        (["--max-new-tokens", "0"], r"--max-new-tokens must be 1 to \d+, got 0"),
        (["--max-new-tokens", str(2**65)], r"--max-new-tokens must be 1 to \d+, got 3"),
        (["--max-new-tokens", "600"], r"--max-new-tokens 600 .*made for 512: ask for at most \d+$"),
        (["--seed", str(2**65)], r"--seed must be 0 to 4294967295, got 3"),
        (["--seed", "-1", "--top-k", "0"], r"--top-k .* at least 1, got 0; --seed must be 0 to"),
        (["--prompt", "a\udce9b"], r"--prompt 2 must be UTF-8, got byte 0xe9 at 1: convert it"),
        (["--system", "\udcff"], r"--system must be UTF-8, got byte 0xff at 0: convert it"),
        (["--prompt", "word " * 9000], r"--prompt 2 has \d+,\d{3} tokens .*made for 512: shorten"),
        (["--raw", "--prompt", ""], r"--prompt 2 is empty: give it some text"),
        (["--prompt", ""], r"--prompt 2 is empty: give it some text"),
        (["--raw", "--system", "x"], r"--system needs a chat template: leave it out"),
        (["--adapter", "absent"], r"absent/adapter_config.json does not exist"),
        (["--dtype", "int8"], r"argument --dtype: invalid choice: 'int8'"),
    ):
        refused(pattern, "generate", model, "--prompt", "Hi", *arguments)
    for name in ("", " "):
        refused(r"MODEL is empty: give the folder of a run", "generate", name, "--prompt", "Hi")
    for name in ("./absent", "absent", "a/b/c", "runs/", "spaced name/x"):
        refused(
            rf"{name}: no such folder of a run or a model.*the hub was not asked",
            "generate", name, "--prompt", "Hi",
        )  # fmt: skip
    refused(
        r"/.* holds rows.jsonl, run.yaml: give a run's folder, which holds config.yaml, or a model",
        "generate", str(Path.cwd()), "--prompt", "Hi",
    )  # fmt: skip


def test_a_bad_option_of_generate_is_told_before_weights_are_read(base, here, refused):
    folder = Path(shutil.copytree(base, here / "model"))
    (folder / "model.safetensors").write_text("no weights")
    for options in (["--seed", "-1"], ["--prompt", "word " * 900], ["--adapter", "absent"]):
        message = refused(r"", "generate", str(folder), "--prompt", "Hi", *options)
        assert "safetensors" not in message
    edit_json(folder / "generation_config.json", eos_token_id={"id": 2})
    refused(r"eos_token_id must be a token id", "generate", str(folder), "--prompt", "Hi")


def test_a_prompt_on_standard_input_that_is_not_utf_8_is_refused(base, refused, monkeypatch):
    for errors in ("strict", "surrogateescape"):
        stream = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8", errors)
        monkeypatch.setattr("sys.stdin", stream)
        refused(r"standard input must be UTF-8, got byte 0xe9 at 3", "generate", str(base))


def test_export_refuses_an_occupied_folder(good_adapter, here, refused):
    (here / "out").mkdir()
    (here / "out" / "notes.txt").write_text("mine")
    refused(
        r"out exists and is not an empty folder; choose another path",
        "export",
        str(good_adapter),
        "--format",
        "peft",
        "--out",
        "out",
    )


def test_export_refuses_what_is_no_run(here, refused):
    arguments = ["--format", "merged", "--out", "out"]
    refused(
        r"holds rows.jsonl, run.yaml: give a run's folder, which holds config.yaml, or an "
        r"adapter's, which holds adapter_config.json",
        "export", str(here), *arguments,
    )  # fmt: skip
    refused(r"absent does not exist: give a run's folder", "export", "absent", *arguments)
    refused(r"rows.jsonl is a file: give a run's folder", "export", "rows.jsonl", *arguments)
    refused(
        r"argument --format: invalid choice: 'gguf'",
        "export",
        str(here),
        "--format",
        "gguf",
        "--out",
        "out",
    )


def test_export_refuses_an_adapter_that_names_no_base(good_adapter, here, refused):
    folder = Path(shutil.copytree(good_adapter, here / "adapter"))
    edit_json(folder / "adapter_config.json", base_model_name_or_path=None)
    refused(
        r"adapter_config.json names no base model: pass --base",
        "export",
        "adapter",
        "--format",
        "merged",
        "--out",
        "out",
    )


def test_export_refuses_a_base_of_another_type(good_adapter, here, refused):
    folder = Path(shutil.copytree(good_adapter, here / "adapter"))
    edit_json(folder / "adapter_config.json", base_model_name_or_path=["a", 1])
    expected = r"adapter_config.json: base_model_name_or_path must be text or null, got \['a', 1\]"
    refused(expected, "export", "adapter", "--format", "merged", "--out", "out")


def test_a_table_with_a_column_without_a_name_is_refused(here, refused):
    (here / "rows.csv").write_text(",prompt,completion\n0,Hi,Ho\n")
    expected = r"rows.{}: column 1 of 3 has no name: name it, or leave it out"
    refused(expected.format("csv:1"), "validate", "run.yaml", "data.train=rows.csv")
    columns = {"": ["x"], "prompt": ["Hi"], "completion": ["Ho"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), here / "rows.parquet")
    refused(expected.format("parquet"), "validate", "run.yaml", "data.train=rows.parquet")


def test_a_command_without_its_arguments_is_refused(refused):
    refused(r"the following arguments are required: config", "train")
    refused(r"the following arguments are required: .*--out", "export", "x", "--format", "peft")


def test_a_step_without_supervised_tokens_cannot_come_from_a_file(here, refused):
    """Rows that supervise nothing are refused, or dropped, before steps are made of them."""
    good = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
    (here / "rows.jsonl").write_text(lines(good, {"input_ids": [1], "labels": [1]}))
    one_row = "train.per_device_train_batch_size=1"
    refused(r"1 of 2 rows have no supervised token", "train", "run.yaml", one_row)
    (here / "rows.jsonl").write_text(lines({"input_ids": [1], "labels": [1]}))
    refused(
        r"none of 1 rows is left: .*1 have no supervised token",
        "train",
        "run.yaml",
        "data.unsupervised=drop",
    )
