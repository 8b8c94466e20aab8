"""Overrides, configs from Python, and what is said of any value that cannot be."""

import copy
import datetime
import re
import subprocess
from typing import Any

import pytest
from pydantic import BaseModel

from lorax.config.adapter import LoraConfig
from lorax.config.explain import ConfigError
from lorax.config.file import check_model
from lorax.config.run import RunConfig, load_config
from lorax.config.train import LrSchedulerKwargs
from tests.config.minimal import MINIMAL, problem, problems


def test_overrides_replace_values_and_create_sections(write):
    overrides = [
        "train.learning_rate=1e-3",
        "lora.target_modules=[q_proj, v_proj]",
        "model.revision=",
        "data.train=other.jsonl",
        "train.lr_scheduler_type=polynomial",
        "train.lr_scheduler_kwargs.power=2",
        "train.learning_rate=5e-3",
    ]
    config = load_config(write(MINIMAL + "train: {learning_rate: -1}\n"), overrides)
    assert config.train.learning_rate == 5e-3
    assert config.train.lr_scheduler_kwargs == LrSchedulerKwargs(power=2.0)
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert config.model.revision is None
    assert config.data.train[0].path == "other.jsonl"


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        ("lora.rank_pattern", "{q_proj:8}", "{q_proj: 8}"),
        ("lora.alpha_pattern", "{v_proj: 2, q_proj:8}", "{q_proj: 8}"),
        ("lora.rank_pattern", "{self_attn.q_proj:8}", "{self_attn.q_proj: 8}"),
        ("train.lr_scheduler_kwargs", "{power:2}", "{power: 2}"),
    ],
)
def test_a_colon_without_a_space_is_told(write, key, value, meant):
    said = f"{key}: a space is missing after the colon: write {meant}"
    assert problem(write(MINIMAL), [f"{key}={value}"]) == f"override '{key}={value}': {said}"
    section, name = key.split(".")
    written = problem(write(f"{MINIMAL}{section}: {{{name}: {value}}}\n"))
    assert re.fullmatch(r"run\.yaml:\d+: " + re.escape(said), written)
    problems(write(MINIMAL), [f"{key}={value.replace(':', ': x')}"])  # nothing is missing
    assert "space" not in problems(write(MINIMAL), ["lora.rank_pattern={'(?:q|k)_proj': }"])[0]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.max_steps", "needs section.key=value"),
        ("=3", "needs section.key=value"),
        ("train..seed=3", "needs section.key=value"),
        ("train.max_steps=[", "train.max_steps: not valid YAML: "),
        ("train.max_steps=2024-13-45", "train.max_steps: not valid YAML: "),
        ("train.max_steps=1.5", "train.max_steps: needs a whole number, got 1.5"),
        ("train.max_step=1", "train.max_step: unknown key; did you mean train.max_steps?"),
        ("trian.max_steps=1", "trian: unknown key; did you mean train?"),
        ("model.dtype.x=1", "model.dtype.x: "),
        ("data.train.0.path=a", "data.train is the text 'rows.jsonl', not a section"),
        ("lora.rank_pattern={a: 1, a: 2}", "lora.rank_pattern.a: duplicate key"),
        ("train.warmup_ratio=2", "train.warmup_ratio: needs a number <= 1.0, got 2"),
        ("lora={r: 0}", "lora.r: needs a number >= 1, got 0"),
    ],
)
def test_wrong_override_is_named(write, override, expected):
    found = problems(write(MINIMAL + "lora: {r: 4}\n"), [override])
    assert found[0].startswith(f"override {override!r}: {expected}") or "model.dtype.x" in override
    assert len(found) == 1


TEXTS = [
    "Assistant:",
    "User: ",
    "### Response:\n",
    "[INST]",
    "[/INST] #",
    "{assistant}",
    "{{ x }}",
    "*assistant*",
    "&amp",
    "!x",
    "%x",
    "@assistant",
    "`x`",
    "- a",
    "| x",
    "a: b: c",
    "12",
    "true",
    "2026-11-30",
    "\tx",
    "it's",
]


@pytest.mark.parametrize("text", TEXTS)
def test_an_override_of_a_key_that_takes_text_is_that_text(write, text):
    overrides = [f"data.response_part={text}", "data.instruction_part=user"]
    assert load_config(write(MINIMAL), overrides).data.response_part == text


def test_quotes_and_null_are_yaml_in_an_override_of_a_key_that_takes_text(write):
    config = load_config(write(MINIMAL), [r'model.revision="a\nb"', "model.adapter='it''s'"])
    assert (config.model.revision, config.model.adapter) == ("a\nb", "it's")
    for nothing in ("null", "~", ""):
        config = load_config(write(MINIMAL), ["model.revision=a", f"model.revision={nothing}"])
        assert config.model.revision is None


@pytest.mark.parametrize(
    "override",
    [
        "lora.target_modules=[qv]_proj",
        "lora.target_modules=(?x) q_proj # the query",
        "lora.exclude_modules=%layer",
        'lora.exclude_modules=`it\'s` "a"\\b: $HOME',
        "data.train=rows #1/a.jsonl",
        "data.train=#1.jsonl",
        "data.train=a: b.jsonl",
        "model.revision='a",
        'model.revision="a',
    ],
)
def test_the_quotes_that_an_error_shows_for_an_override_work_in_a_shell(write, override):
    key, _, text = override.partition("=")
    message = problem(write(MINIMAL), [override])
    assert message.startswith(f"override {override!r}: {key}: ")
    command = f"printf %s {message.rpartition('quote it for YAML and the shell: ')[2]}"
    shell = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    config = load_config(write(MINIMAL), [shell.stdout])
    section, name = key.split(".")
    value = getattr(getattr(config, section), name)
    assert (value[0].path if key == "data.train" else value) == text


def test_lora_config_takes_lists_and_tuples():
    assert LoraConfig(r=8, target_modules=["q_proj"]) == LoraConfig(  # pyright: ignore[reportArgumentType]
        r=8, target_modules=("q_proj",)
    )
    assert LoraConfig(modules_to_save=["lm_head"]).modules_to_save == ("lm_head",)  # pyright: ignore[reportArgumentType]
    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[0, 2])  # pyright: ignore[reportArgumentType]
    assert config.layers_to_transform == (0, 2)  # pyright: ignore[reportArgumentType]


def test_defaults_are_not_shared():
    LoraConfig().rank_pattern["q_proj"] = 3
    assert LoraConfig().rank_pattern == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {optim: sgd, adam_beta1: 0.8}", "train.adam_beta1: optim `sgd` does not read it"),
        ("train: {optim: lion, adam_epsilon: 1.0e-6}", "train.adam_epsilon: optim `lion` does not"),
        (
            "train: {gradient_checkpointing: selective, kept_layers: 2}",
            "train.kept_layers: gradient_checkpointing `selective` does not read it, only `full`",
        ),
        (
            "train: {memory_gib: 20}",
            "train.memory_gib: gradient_checkpointing `full` does not read it, only `auto` does",
        ),
        (
            "train: {gradient_checkpointing: auto, kept_layers: 2}",
            "train.kept_layers: gradient_checkpointing `auto` decides it itself",
        ),
    ],
)
def test_a_key_that_nothing_would_read_is_refused(write, text, message):
    assert message in problem(write(MINIMAL + text + "\n"))


JUNK = (
    None, True, 0, -1, 10**400, 10**5000, 1.5, float("nan"), float("inf"), "", "x", "y" * 20_000,
    "\ud800", "a\0b", b"x", [], [1], ["x"], [[1]], [None], {}, {"x": 1}, {1: 2}, {"x": 10**400},
    {"\ud800": 1}, {"x": None}, {"z" * 20_000: 1}, datetime.date(2024, 1, 2),
)  # fmt: skip


def keys_of(model, prefix=()):
    for name, field in model.model_fields.items():
        yield (*prefix, name)
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from keys_of(inner, (*prefix, name))


@pytest.mark.parametrize("key", list(keys_of(RunConfig)), ids=".".join)
def test_whatever_comes_is_refused_in_short_words(key):
    sections: dict[str, Any] = {
        "model": {"name_or_path": "m"},
        "data": {"train": "rows.jsonl"},
        "save": {"output_dir": "run"},
    }
    for value in JUNK:
        data = copy.deepcopy(sections)
        section = data
        for name in key[:-1]:
            section = section.setdefault(name, {})
        section[key[-1]] = value
        try:
            check_model(RunConfig, data, "run.yaml")
        except ConfigError as error:
            message = str(error)
            assert "another value" not in message and "Input should" not in message
            for line in message.splitlines():
                assert line.startswith(f"run.yaml: {'.'.join(key)}") and len(line) < 700


def test_no_default_message_of_the_checker_is_reachable(write):
    text = 'train: {optim: "\\ud800"}\n'
    assert "train.optim: needs text of whole characters" in problem(write(MINIMAL + text))


@pytest.mark.parametrize("pattern", ["(" * 20_000, "a{" + "9" * 30 + "}", "x" * 20_000 + "("])
def test_a_pattern_that_is_none_is_shown_in_short(pattern):
    with pytest.raises(ConfigError) as refused:
        check_model(LoraConfig, {"target_modules": pattern}, "adapter_config.json")
    assert "needs a regular expression, got '" in str(refused.value)
    assert len(str(refused.value)) < 500
