"""Bad configs: one readable message, exit code 2, and nothing written or changed."""

import os

import pytest

from lorax.cli.main import main
from tests.cli.damage import listing

pytestmark = pytest.mark.slow


def test_the_undamaged_input_is_valid(here, capsys):
    before = listing(here)
    assert main(["validate", "run.yaml"]) == 0
    captured = capsys.readouterr()
    assert captured.out.endswith("run.yaml: valid\n")
    assert captured.err == ""
    assert listing(here) == before


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
