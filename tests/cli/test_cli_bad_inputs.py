"""Bad input of every kind: one readable message, exit code 2, and nothing written or changed."""

import hashlib
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pyarrow.parquet
import pytest
from flax import nnx
from safetensors.numpy import save_file

import lorax
from lorax.cli.main import main
from lorax.interop.load import find_stored_dtype, load_model
from lorax.interop.peft import save_adapter
from lorax.interop.safetensors import read_tensors

pytestmark = pytest.mark.slow

TINY = Path(__file__).parents[2] / "examples" / "tiny" / "model"
Q0 = "model.layers.0.self_attn.q_proj.weight"
ADAPTER_A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
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


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(TINY, folder)
    before = listing(folder)
    yield folder
    assert listing(folder) == before


@pytest.fixture(scope="module")
def good_adapter(base, tmp_path_factory):
    settings = lorax.LoraConfig(r=4, target_modules=("q_proj",))
    model = lorax.apply_lora(load_model(base, dtype=jnp.float32), settings, rngs=nnx.Rngs(0))
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    return save_adapter(model, folder, base_model_name_or_path=str(base))


@pytest.fixture
def here(base, tmp_path, monkeypatch):
    """The working directory, with a good config and good rows in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG.format(model=base))
    (tmp_path / "rows.jsonl").write_text(GOOD_ROWS)
    return tmp_path


def listing(folder):
    """Everything below a folder, with the hash of what each file holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        is_file = path.is_file() and not path.is_symlink()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if is_file else None
        found[str(path.relative_to(folder))] = content
    return found


@pytest.fixture
def refused(here, capsys):
    """Runs a command that must fail, and compares its message with a pattern."""

    def check(pattern, command, *arguments):
        before = listing(here)
        capsys.readouterr()
        try:
            code = main([command, *arguments])
        except SystemExit as stop:  # argparse's own errors
            code = stop.code
        message = capsys.readouterr().err
        assert code == 2, message
        message = re.sub(r"\Ausage: .*?(?=^lorax )", "", message, flags=re.DOTALL | re.MULTILINE)
        # What is told of a base that was asked for stands before the error.
        message = re.sub(rf"\A(lorax {command}: (?!error: ).*\n)+", "", message)
        assert message.startswith(f"lorax {command}: error: ")
        assert re.search(pattern, message), message
        assert "Traceback" not in message
        assert message.count(": error: ") == 1
        assert message.strip().count("\n") <= 2
        assert len(message) < 1200
        assert listing(here) == before
        return message

    return check


def test_the_undamaged_input_is_valid(here, capsys):
    before = listing(here)
    assert main(["validate", "run.yaml"]) == 0
    captured = capsys.readouterr()
    assert captured.out.endswith("run.yaml: valid\n")
    assert captured.err == ""
    assert listing(here) == before


# --- Config files ------------------------------------------------------------------------------

CONFIG_FILES = {
    "unknown key": (
        "lora:\n  rnak: 4\n",
        r"run.yaml:9: lora.rnak: unknown key; the keys of lora are r, lora_alpha",
    ),
    "unknown key with a near name": (
        "train:\n  learning_rte: 1e-4\n",
        r"run.yaml:9: train.learning_rte: unknown key; did you mean train.learning_rate\?",
    ),
    "key of another section": (
        "train:\n  r: 4\n",
        r"run.yaml:9: train.r: unknown key; did you mean lora.r\?",
    ),
    "name from another trainer": (
        "train:\n  batch_size: 4\n",
        r"run.yaml:9: train.batch_size: .*did you mean train.per_device_train_batch_size\?",
    ),
    "duplicate key": (
        "lora:\n  r: 4\n  r: 8\n",
        r"run.yaml:10: lora.r: duplicate key, first on line 9: keep one",
    ),
    "duplicate section": (
        "data:\n  packing: true\n",
        r"run.yaml:8: data: duplicate key, first on line 4",
    ),
    "wrong type": (
        "data_: 3\n",
        r"run.yaml:8: data_: unknown key; did you mean data\?",
    ),
    "text for a number": (
        "lora:\n  r: sixteen\n",
        r"run.yaml:9: lora.r: needs a whole number, got the text 'sixteen'",
    ),
    "quoted number": (
        'train:\n  learning_rate: "3e-4"\n',
        r"run.yaml:9: train.learning_rate: needs a number, got the text '3e-4': remove the quotes",
    ),
    "fraction for a count": (
        "lora:\n  r: 4.5\n",
        r"run.yaml:9: lora.r: needs a whole number, got 4.5",
    ),
    "NaN": (
        "train:\n  learning_rate: .nan\n",
        r"run.yaml:9: train.learning_rate: needs a finite number.*, got nan",
    ),
    "negative steps": (
        "train:\n  max_steps: -5\n",
        r"run.yaml:9: train.max_steps: needs a whole number >= 1, or -1, got -5",
    ),
    "zero accumulation": (
        "train:\n  gradient_accumulation_steps: 0\n",
        r"run.yaml:9: train.gradient_accumulation_steps: needs a number >= 1, got 0",
    ),
    "unknown choice": (
        "train:\n  optim: adamw_8bit\n",
        r"run.yaml:9: train.optim: needs `adamw`.*got the text 'adamw_8bit'; did you mean adamw\?",
    ),
    "section that is a list": (
        "lora: [r, 4]\n",
        r"run.yaml:8: lora: needs a mapping .*, got a list of 2",
    ),
    "number of 400 digits": (
        f"lora:\n  r: {10**400}\n",
        r"run.yaml:9: lora.r: needs a number <= 2147483647, got a number of about 400 digits",
    ),
    "number of 5,000 digits": (
        f"lora:\n  r: {'1' * 5000}\n",
        r"run.yaml: not valid YAML: a number in it has more than 4,300 digits",
    ),
    "text of 20,000 characters": (
        f"train:\n  optim: {'x' * 20_000}\n",
        r"run.yaml:9: train.optim: needs .*got the text 'x{100}'… \(19,900 characters more\)",
    ),
    "key of 20,000 characters": (
        f"train:\n  ? {'x' * 20_000}\n  : 1\n",
        r"run.yaml:9: train.x{100}… \(19,900 characters more\): unknown key",
    ),
    "half a character": (
        'train:\n  optim: "\\ud800"\n',
        r"run.yaml:9: train.optim: needs text of whole characters",
    ),
    "settings that contradict": (
        "train:\n  warmup_ratio: 0.1\n  warmup_steps: 5\n",
        r"run.yaml:9: train.warmup_ratio: set warmup_ratio or warmup_steps, not both",
    ),
    "evaluation without rows": (
        "eval:\n  strategy: epoch\n",
        r"run.yaml:9: eval.strategy: needs held-out rows: set data.eval",
    ),
    "lora section of a full run": (
        "lora:\n  r: 4\ntrain:\n  method: full\n",
        r"run.yaml:8: lora: train.method `full` has no adapter: remove it",
    ),
    "tab": (
        "lora:\n\tr: 4\n",
        r"run.yaml:9: not valid YAML: indented with a tab: use spaces",
    ),
    "alias": (
        "lora: &settings\n  r: 4\ntrain: *settings\n",
        r"run.yaml:\d+: not valid YAML: anchors and aliases .*write the value out",
    ),
}


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_a_bad_config_is_refused_with_line_and_key(here, refused, name):
    text, pattern = CONFIG_FILES[name]
    with (here / "run.yaml").open("a") as file:
        file.write(text)
    refused(pattern, "validate", "run.yaml")


WHOLE_FILES = {
    "empty": (b"", r"run.yaml: the file is empty: it needs sections such as `model:`"),
    "comments only": (b"# nothing\n", r"run.yaml: the file is empty"),
    "not YAML": (b"model: [1, 2\n", r"run.yaml:\d: not valid YAML"),
    "a sentence": (b"train the model please\n", r"run.yaml:1: needs sections such as `model:`"),
    "not UTF-8": (b"model:\n  name_or_path: caf\xe9\n", r"run.yaml:2: needs UTF-8, got byte 0xe9"),
    "no data section": (
        b"model:\n  name_or_path: x\nsave:\n  output_dir: y\n",
        r"run.yaml: data: missing: this section needs data.train",
    ),
}


@pytest.mark.parametrize("name", WHOLE_FILES)
def test_a_file_that_is_no_config_is_refused(here, refused, name):
    content, pattern = WHOLE_FILES[name]
    (here / "run.yaml").write_bytes(content)
    refused(pattern, "validate", "run.yaml")


def test_several_problems_are_told_at_once(here, refused):
    message = refused(
        r"lora.rr: unknown key", "validate", "run.yaml", "lora.rr=4", "train.max_steps=0"
    )
    assert "train.max_steps: needs a whole number >= 1, or -1, got 0" in message


@pytest.mark.parametrize("command", ["train", "validate", "inspect"])
def test_a_missing_config_is_refused_by_every_command(refused, command):
    refused(r"absent.yaml: cannot read the config: No such file", command, "absent.yaml")
    refused(r"the path of the config is empty: give that of a YAML file", command, "")


NUL = '"a\\0b"'
PATHS = ["model.name_or_path", "model.revision", "model.adapter", "data.train", "data.eval"]
PATHS += ["data.chat_template", "save.output_dir", "data.train=[{path: rows.jsonl, split: %s}]"]


@pytest.mark.parametrize("key", PATHS)
def test_a_nul_character_in_a_path_is_named(refused, key):
    override = key % NUL if "%s" in key else f"{key}={NUL}"
    message = refused(r"needs text without a NUL character", "validate", "run.yaml", override)
    assert "embedded null" not in message and "another value" not in message


ENDLESS = {
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a FIFO": os.mkfifo,
    "something large": lambda path: path.write_bytes(b"#" * (2**20 + 1)),
    "something sparse": lambda path: [path.touch(), os.truncate(path, 2**40)],
    "a folder": lambda path: path.mkdir(),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ENDLESS)
def test_a_config_that_would_never_end_is_not_read(here, capsys, kind):
    ENDLESS[kind](here / "endless.yaml")
    assert main(["validate", "endless.yaml"]) == 2
    message = capsys.readouterr().err
    expected = {
        "a folder": "Is a directory",
        "something large": "it has 1 MiB, where 1 would be much",
        "something sparse": "it has 1,048,576 MiB, where 1 would be much",
    }
    reason = expected.get(kind, f"it is {kind}, not a file on a disk")
    assert f"endless.yaml: cannot read the config: {reason}" in message


def test_a_path_that_no_file_can_have_is_refused_in_words(base, here, refused):
    long = "x" * 5000
    for arguments in (
        ("validate", long),
        ("validate", "a\0b"),
        ("validate", "run.yaml", f"model.name_or_path=./{long}"),
        ("validate", "run.yaml", f"model.adapter={long}"),
        ("generate", f"./{long}", "--prompt", "Hi"),
        ("generate", "./a\0b", "--prompt", "Hi"),
        ("generate", "~nobody-at-all/model", "--prompt", "Hi"),
        ("generate", str(base), "--prompt", "Hi", "--adapter", "a\0b"),
        ("export", "a\0b", "--format", "merged", "--out", "out"),
        ("export", "absent", "--format", "merged", "--out", "a\0b"),
        ("export", "absent", "--format", "merged", "--out", long),
    ):
        reason = "too long|NUL character|home directory"
        message = refused(reason, *arguments)
        assert "Errno" not in message and "embedded null" not in message


OVERRIDES = {
    "no value": ("lora.r", r"override 'lora.r': needs section.key=value, such as"),
    "no section": ("r=4", r"override 'r=4': r: unknown key; did you mean lora.r\?"),
    "not YAML": ("lora.target_modules=[q_proj", r"lora.target_modules: not valid YAML"),
    "below a value": ("data.train.path=x", r"data.train is the text 'rows.jsonl', not a section"),
    "wrong type": ("lora.r=four", r"override 'lora.r=four': lora.r: needs a whole number"),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_a_bad_override_is_refused_by_its_text(refused, name):
    override, pattern = OVERRIDES[name]
    refused(pattern, "validate", "run.yaml", override)


# --- Checkpoints -------------------------------------------------------------------------------


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path, change):
    tensors = {name: value for _, name, value in read_tensors([path])}
    change(tensors)
    save_file(tensors, path)


def edit_weights(change):
    return lambda folder: edit_tensors(folder / "model.safetensors", change)


def edit_config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


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
        r"config.json: quantization_config must be absent .*dequantise it first",
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
        r"model.name_or_path: nobody/nothing: no such folder, and not to be had from the Hugging "
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


# --- Adapters ----------------------------------------------------------------------------------


def edit_adapter(change):
    return lambda folder: edit_tensors(folder / "adapter_model.safetensors", change)


def edit_adapter_config(**changes):
    return lambda folder: edit_json(folder / "adapter_config.json", **changes)


ADAPTERS = {
    "rank of 400 digits": (
        "validate",
        edit_adapter_config(r=10**400),
        r"adapter_config.json: r: needs a number <= 2147483647, got a number of about 400 digits",
    ),
    "base of another type": (
        "validate",
        edit_adapter_config(base_model_name_or_path=5),
        r"adapter_config.json: base_model_name_or_path must be text or null, got 5",
    ),
    "aLoRA": (
        "validate",
        edit_adapter_config(alora_invocation_tokens=[1, 2]),
        r"adapter_config.json: alora_invocation_tokens=\[1, 2\] is not supported; PEFT cannot",
    ),
    "no adapter_config.json": (
        "validate",
        lambda folder: (folder / "adapter_config.json").unlink(),
        r"adapter_config.json does not exist",
    ),
    "another method": (
        "validate",
        edit_adapter_config(peft_type="IA3"),
        r"adapter_config.json: peft_type must be LORA, got 'IA3'",
    ),
    "DoRA": (
        "validate",
        edit_adapter_config(use_dora=True),
        r"adapter_config.json: use_dora=True is not supported; .*merge with PEFT",
    ),
    "PiSSA": (
        "validate",
        edit_adapter_config(init_lora_weights="pissa"),
        r"adapter_config.json: init_lora_weights='pissa' changes the base weights .*convert",
    ),
    "field of another type": (
        "validate",
        edit_adapter_config(r="four"),
        r"adapter_config.json: r: needs a whole number, got the text 'four'",
    ),
    "modules of another model": (
        "validate",
        edit_adapter_config(target_modules=["query_key_value"]),
        r"adapter does not fit /.*: lora.target_modules: 'query_key_value' matches no linear",
    ),
    "missing tensor": (
        "train",
        edit_adapter(lambda tensors: tensors.pop(ADAPTER_A0)),
        rf"adapter_model.safetensors lacks 1 tensors, first {re.escape(ADAPTER_A0)}",
    ),
    "extra tensor": (
        "train",
        edit_adapter(lambda t: t.update({"base_model.model.extra": np.zeros(1, np.float32)})),
        r"adapter_model.safetensors has unexpected 1 tensors, first base_model.model.extra",
    ),
    "another rank": (
        "train",
        edit_adapter_config(r=8),
        r"adapter_model.safetensors: .*lora_A.weight has shape \(4, 128\), needed \(8, 128\)",
    ),
    "values that are not finite": (
        "train",
        edit_adapter(lambda t: t.update({ADAPTER_A0: np.full((4, 128), np.inf, np.float32)})),
        r"lora_A.weight holds values that are not finite",
    ),
    "only a pickle": (
        "train",
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        r"adapter_model.bin is a pickle and is never loaded; save it again",
    ),
    "Git LFS pointer": (
        "train",
        lambda folder: (folder / "adapter_model.safetensors").write_text(LFS_POINTER),
        r"adapter_model.safetensors is a Git LFS pointer",
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_bad_adapter_is_refused(good_adapter, here, refused, name):
    command, damage, pattern = ADAPTERS[name]
    damage(Path(shutil.copytree(good_adapter, here / "adapter")))
    in_headers = name != "values that are not finite"
    for each in dict.fromkeys([*["validate"] * in_headers, command]):
        refused(pattern, each, "run.yaml", f"model.adapter={here / 'adapter'}")


def test_a_lora_section_beside_an_adapter_is_refused(good_adapter, refused):
    refused(
        r"lora: model.adapter brings its own settings: remove it",
        "validate",
        "run.yaml",
        f"model.adapter={good_adapter}",
        "lora.r=4",
    )


# --- Targets -----------------------------------------------------------------------------------

TARGETS = {
    "near name": (
        ["lora.target_modules=[q_proj, v_porj]"],
        r"lora.target_modules: 'v_porj' matches no linear module; did you mean v_proj",
    ),
    "name as a regular expression": (
        ["lora.target_modules=q_proj"],
        r"lora.target_modules: 'q_proj' matches .*for name endings write a list",
    ),
    "not a regular expression": (
        ["lora.target_modules='*_proj'"],
        r"lora.target_modules: needs a regular expression, got '\*_proj'",
    ),
    "module that is not linear": (
        ["lora.target_modules=[q_proj, embed_tokens]"],
        r"embed_tokens.* cannot carry an adapter: only linear modules can",
    ),
    "rank too large": (
        ["lora.r=65"],
        r"k_proj: rank must be in \[1, 64\] for a 128 × 64 layer, got 65; .*lora.rank_pattern",
    ),
    "layer out of range": (
        ["lora.target_modules=[q_proj]", "lora.layers_to_transform=[0, 4]"],
        r"lora.layers_to_transform: no target module lies in layer 4; .*layers are 0, 1, 2, 3",
    ),
    "unused rank_pattern": (
        ["lora.target_modules=[q_proj]", "lora.rank_pattern={v_proj: 8}"],
        r"lora.rank_pattern: 'v_proj' matches no target module; the model has q_proj|did you mean",
    ),
    "unused exclusion": (
        ["lora.exclude_modules=[w_proj]"],
        r"lora.exclude_modules: 'w_proj' matches no module; did you mean",
    ),
    "everything excluded": (
        ["lora.target_modules=[q_proj]", "lora.exclude_modules=[q_proj]"],
        r"leave no module to adapt; narrow them",
    ),
    "bias that does not exist": (
        ["lora.bias=all"],
        r"lora.bias is 'all' but no layer of the model has a bias",
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_lora_settings_that_do_not_fit_the_model_are_refused(refused, name):
    overrides, pattern = TARGETS[name]
    refused(pattern, "validate", "run.yaml", *overrides)


# --- Data --------------------------------------------------------------------------------------

DATA = {
    "bad JSON": (
        GOOD_ROWS + '{"messages": [}\n',
        [],
        r"rows.jsonl:5: invalid JSON: .*column",
    ),
    "row that is no object": (
        GOOD_ROWS + "[1, 2]\n",
        [],
        r"rows.jsonl:5: a row must be a JSON object, got list",
    ),
    "key twice": (
        '{"messages": [], "messages": []}\n',
        [],
        r"rows.jsonl:1: .*key 'messages' stands twice",
    ),
    "empty file": ("", [], r"rows.jsonl: the file is empty"),
    "blank lines": ("\n \n\n", [], r"rows.jsonl: the file (is empty|holds no rows)"),
    "Git LFS pointer": (LFS_POINTER, [], r"rows.jsonl: this is a Git LFS pointer.*git lfs pull"),
    "web page": ("<!DOCTYPE html><html>", [], r"rows.jsonl: this is an HTML page, not data"),
    "invalid UTF-8": (
        GOOD_ROWS.encode() + b'{"text": "caf\xe9"}\n',
        [],
        r"rows.jsonl:5: invalid UTF-8",
    ),
    "wrong columns": (
        lines({"question": "Hi", "answer": "Ho"}),
        [],
        r"rows.jsonl:1: the columns \['answer', 'question'\] fit no format; rename them",
    ),
    "columns of the second row": (
        lines(GOOD_ROW, {"text": "Hi"}),
        [],
        r"rows.jsonl:2: a row of format 'messages' needs the columns messages, got text",
    ),
    "unknown role": (
        lines(conversation(("human", "Hi"), ("assistant", "Ho"))),
        [],
        r"rows.jsonl:1: messages\[0\].role must be one of system, .*got 'human'",
    ),
    "no assistant turn": (
        lines(GOOD_ROW, conversation(("user", "Hi"))),
        [],
        r"rows.jsonl:2: the conversation has no assistant turn to learn from, only user",
    ),
    "empty answer": (
        lines(conversation(("user", "Hi"), ("assistant", " "))),
        [],
        r"rows.jsonl:1: messages\[1\].content is empty",
    ),
    "content that is no text": (
        lines({"messages": [{"role": "user", "content": 7}]}),
        [],
        r"rows.jsonl:1: messages\[0\].content must be text, got int 7",
    ),
    "overlong row": (
        lines(GOOD_ROW, conversation(("user", "Hi " * 200), ("assistant", "Ho"))),
        ["data.max_seq_length=64"],
        r"1 of 2 rows are longer than data.max_seq_length: 64; the first, rows.jsonl:2 has \d+ "
        r"tokens. Raise max_seq_length, or set data.overlong",
    ),
    "nothing left after dropping": (
        GOOD_ROWS,
        ["data.max_seq_length=2", "data.overlong=drop"],
        r"none of 4 rows is left: 4 are longer than data.max_seq_length: 2",
    ),
    "row without a supervised token": (
        lines({"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [5], "labels": [5]}),
        [],
        r"1 of 2 rows have no supervised token; the first is rows.jsonl:2. .*unsupervised: drop",
    ),
    "token id out of the vocabulary": (
        lines({"input_ids": [1, 512], "labels": [-100, 512]}),
        [],
        r"rows.jsonl:1: token id 512 is outside of a vocabulary of 512; use the tokenizer",
    ),
    "labels of another length": (
        lines({"input_ids": [1, 2, 3], "labels": [1, 2]}),
        [],
        r"rows.jsonl:1: labels has 2 entries and input_ids has 3",
    ),
    "labels shifted already": (
        lines({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}),
        [],
        r"rows.jsonl:1: labels\[0\] is 2 and input_ids\[0\] is 1: .*not the next one",
    ),
    "text with a part to learn": (
        lines({"text": "Once upon a time"}),
        [],
        r"rows.jsonl:1: .*data.loss_on: assistant cannot apply; set data.loss_on: all",
    ),
    "split that is not there": (
        GOOD_ROWS,
        ["data.train=[{path: rows.jsonl, split: validation}]"],
        r"rows.jsonl: split 'validation': .*A file has one split, 'train'",
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_bad_rows_are_refused_with_their_line(here, refused, name):
    content, overrides, pattern = DATA[name]
    content = content if isinstance(content, bytes) else content.encode()
    (here / "rows.jsonl").write_bytes(content)
    refused(pattern, "validate", "run.yaml", *overrides)


SOURCES = {
    "absent file": (
        ["data.train=absent.jsonl"],
        r"absent.jsonl: no such file \(looked for /.*absent.jsonl\)",
    ),
    "absent held-out file": (["data.eval=absent.jsonl"], r"absent.jsonl: no such file"),
    "file of another kind": (
        ["data.train=./run.yaml"],
        r"run.yaml: a file of another kind; needed is a .jsonl, .json, .parquet, .csv file",
    ),
    "no source": (["data.train=[]"], r"data.train: needs at least 1 entry, got a list of 0"),
    "absent chat template": (
        ["data.chat_template=absent.jinja"],
        r"absent.jinja",
    ),
    "markers that never match": (
        ["data.instruction_part='[U]'", "data.response_part='[A]'"],
        r"rows.jsonl:1, .*\[A\]",
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_bad_data_settings_are_refused(refused, name):
    overrides, pattern = SOURCES[name]
    refused(pattern, "validate", "run.yaml", *overrides)


ABSENT = {"a file": "absent.jsonl", "another kind": "absent.txt", "a folder": "absent.parquet"}


@pytest.mark.parametrize("key", ["data.train", "data.eval"])
@pytest.mark.parametrize("kind", ABSENT)
def test_a_source_that_is_not_there_is_told_with_its_key(here, refused, key, kind):
    if kind == "a folder":
        (here / ABSENT[kind]).mkdir()
    path = f"./{ABSENT[kind]}"
    settings = ("eval.strategy=steps",) * (key == "data.eval")
    for override in (f"{key}={path}", f"{key}=[rows.jsonl, {{path: {path}}}]"):
        refused(rf"error: {key}: {re.escape(path)}: ", "validate", "run.yaml", override, *settings)


# --- Output and machine ------------------------------------------------------------------------


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
        r"log.report_to names tensorboard, which is not installed: pip install",
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


# --- The other commands ------------------------------------------------------------------------


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
