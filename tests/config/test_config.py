import copy
import datetime
import re
import subprocess
import textwrap
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from lorax.config.adapter import LoraConfig
from lorax.config.file import ConfigError, check_model
from lorax.config.model import ModelConfig
from lorax.config.run import RunConfig, SaveConfig, dump_config, load_config
from lorax.config.schema import FAMILIAR
from lorax.config.train import LrSchedulerKwargs, TrainConfig

MINIMAL = """\
model: {name_or_path: tiny}
data: {train: rows.jsonl}
save: {output_dir: out}
"""


@pytest.fixture
def write(tmp_path):
    def write_file(text: str | bytes) -> str:
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else textwrap.dedent(text).encode())
        return str(path)

    return write_file


def problems(path, overrides=()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return [line.replace(str(path), "run.yaml") for line in str(caught.value).splitlines()]


def problem(path, overrides=()) -> str:
    found = problems(path, overrides)
    assert len(found) == 1, found
    return found[0]


# What is accepted.


def test_minimal_file_gets_the_documented_defaults(write):
    config = load_config(write(MINIMAL))
    assert config.model.name_or_path == "tiny"
    assert (config.lora.r, config.lora.lora_alpha, config.lora.target_modules) == (
        16,
        16.0,
        "all-linear",
    )
    assert config.lora.init_lora_weights is True
    assert config.train.learning_rate == 2e-4
    assert config.train.lr_scheduler_type == "cosine"
    assert config.save.export == ("peft",)
    assert config.data.eval == ()


def test_config_cannot_be_changed(write):
    config = load_config(write(MINIMAL))
    with pytest.raises(ValidationError, match="frozen"):
        config.train.learning_rate = 1.0  # pyright: ignore[reportAttributeAccessIssue]


def test_numbers_follow_yaml_1_2(write):
    path = write(MINIMAL + "train: {learning_rate: 3e-4, weight_decay: 1, max_steps: 010}\n")
    train = load_config(path).train
    assert train.learning_rate == 3e-4
    assert train.weight_decay == 1.0 and isinstance(train.weight_decay, float)
    assert train.max_steps == 10


@pytest.mark.parametrize(
    ("written", "paths"),
    [
        ("a.jsonl", ["a.jsonl"]),
        ("[a.jsonl, b.csv]", ["a.jsonl", "b.csv"]),
        ("[{path: a.jsonl}, b.csv]", ["a.jsonl", "b.csv"]),
    ],
)
def test_paths_stand_for_sources(write, written, paths):
    text = MINIMAL.replace("rows.jsonl", f"{written}, eval: {written}")
    data = load_config(write(text)).data
    assert [source.path for source in data.train] == paths
    assert [source.path for source in data.eval] == paths
    assert data.train[0].split == "train"


def test_dumped_config_reads_back_equal(write, tmp_path):
    text = """\
        model: {name_or_path: "1e-4", revision: "no", dtype: float32}
        lora:
          r: 8
          target_modules: [q_proj, v_proj]
          exclude_modules: .*\\.lm_head
          layers_to_transform: [0, 1]
          rank_pattern: {q_proj: 4}
          alpha_pattern: {"^model\\\\.layers": 3}
          init_lora_weights: gaussian
        data:
          train: [{path: a.jsonl}, {path: some/dataset, name: "null", split: "train[:9]"}]
          eval: held out ü.jsonl
          instruction_part: "<|user|>\\n  trailing "
          response_part: "# not a comment: ' \\" \\t"
        train:
          lr_scheduler_type: polynomial
          lr_scheduler_kwargs: {power: 2, lr_end: 0}
          adam_epsilon: 1e-12
          warmup_ratio: 0.1
        eval: {strategy: steps, early_stopping_patience: 2, exact_match: true}
        save: {output_dir: out, load_best_model_at_end: true, export: [peft, merged]}
        log: {report_to: [jsonl, tensorboard]}
        mesh: {data: -1}
    """
    config = load_config(write(text))
    assert config.lora.target_modules == ("q_proj", "v_proj")
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_config(config), encoding="utf-8")
    assert load_config(dumped) == config


def test_dump_has_the_order_of_the_models_and_no_settings_of_other_schedules(write):
    lines = dump_config(load_config(write(MINIMAL))).splitlines()
    sections = [line.rstrip(":") for line in lines if not line.startswith((" ", "-"))]
    assert sections == list(RunConfig.model_fields)
    assert lines[1] == "  name_or_path: tiny"
    assert "  lr_scheduler_kwargs: {}" in lines


def test_dumped_full_fine_tuning_reads_back_equal(write, tmp_path):
    config = load_config(write(MINIMAL + "train: {method: full}\n"))
    assert config.save.export == ("merged",)
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_config(config), encoding="utf-8")
    assert load_config(dumped) == config


# The form of an error.


def test_all_problems_come_in_the_order_of_the_file(write):
    text = """\
        model:
          name_or_path: tiny
          dtype: bfloat
        data:
          train: [{path: a.jsonl, splt: train}]
        train:
          lerning_rate: 3
          learning_rate: "1e-4"
          seed: 1
          seed: 2
        save: {save_steps: 0}
    """
    assert problems(write(text)) == [
        "run.yaml:3: model.dtype: needs `bfloat16`, `float16` or `float32`, got the text 'bfloat'; "
        "did you mean bfloat16?",
        "run.yaml:5: data.train.0.splt: unknown key; did you mean data.train.0.split?",
        "run.yaml:7: train.lerning_rate: unknown key; did you mean train.learning_rate?",
        "run.yaml:8: train.learning_rate: needs a number, got the text '1e-4': remove the quotes",
        "run.yaml:10: train.seed: duplicate key, first on line 9: keep one",
        "run.yaml:11: save.output_dir: missing: this key has no default, set it",
        "run.yaml:11: save.save_steps: needs a number >= 1, got 0",
    ]


@pytest.mark.parametrize(
    ("section", "key", "meant"),
    [
        ("train", "lora_alpha", "lora.lora_alpha"),
        ("train", "lr", "train.learning_rate"),
        ("train", "steps", "eval.steps or train.max_steps"),
        ("lora", "target_module", "lora.target_modules"),
        ("eval", "eval_strategy", "eval.strategy"),
    ],
)
def test_unknown_key_names_the_one_that_was_meant(write, section, key, meant):
    found = problem(write(MINIMAL + f"{section}:\n  {key}: 3\n"))
    assert found == f"run.yaml:5: {section}.{key}: unknown key; did you mean {meant}?"


def test_unknown_key_like_no_other_lists_the_keys(write):
    found = problem(write(MINIMAL + "mesh: {zzz: 1}\n"))
    assert found == "run.yaml:4: mesh.zzz: unknown key; the keys of mesh are data"


def test_unknown_section_and_key_without_section(write):
    assert problems(write(MINIMAL + "lora_config: {}\nlearning_rate: 1.0\n3: 4\n")) == [
        "run.yaml:4: lora_config: unknown key; did you mean lora?",
        "run.yaml:5: learning_rate: unknown key; did you mean train.learning_rate?",
        "run.yaml:6: 3: needs a text key, got 3",
    ]


def test_familiar_names_point_at_keys_that_exist():
    for place in FAMILIAR.values():
        section, key = place.split(".")
        model: Any = RunConfig.model_fields[section].annotation
        assert key in model.model_fields, place


def test_missing_sections_name_what_they_need(write):
    assert problems(write("train: {seed: 1}\n")) == [
        "run.yaml: model: missing: this section needs model.name_or_path",
        "run.yaml: data: missing: this section needs data.train",
        "run.yaml: save: missing: this section needs save.output_dir",
    ]


# Types and ranges.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "train: {learning_rate: '1e-4'}",
            "needs a number, got the text '1e-4': remove the quotes",
        ),
        ("train: {learning_rate: true}", "needs a number, got true"),
        ("train: {learning_rate: .nan}", "needs a finite number, got nan"),
        ("train: {learning_rate: .inf}", "needs a finite number, got inf"),
        ("train: {learning_rate: 0}", "needs a number > 0.0, got 0"),
        ("train: {learning_rate: -1e-4}", "needs a number > 0.0, got -0.0001"),
        ("train: {learning_rate: [1]}", "needs a number, got a list of 1"),
        ("train: {learning_rate: }", "needs a number, got nothing (null)"),
        ("train: {warmup_steps: true}", "needs a whole number, got true"),
        ("train: {warmup_steps: 1.0}", "needs a whole number, got 1.0"),
        ("train: {warmup_steps: -1}", "needs a number >= 0, got -1"),
        ("train: {max_steps: 0}", "needs a whole number >= 1, or -1, got 0"),
        ("train: {max_steps: -2}", "needs a whole number >= 1, or -1, got -2"),
        ("train: {num_train_epochs: 0}", "needs a number > 0.0, got 0"),
        ("train: {adam_beta1: 1}", "needs a number < 1.0, got 1"),
        ("train: {seed: 4294967296}", "needs a number < 4294967296, got 4294967296"),
        ("train: {seed: 2024-01-01}", "needs a whole number, got 2024-01-01"),
        ("train: []", "needs a mapping (`key: value` lines), got a list of 0"),
        ("train:", "needs a mapping (`key: value` lines), got nothing (null)"),
        ("mesh: {data: 0}", "needs a whole number >= 1, or -1, got 0"),
        ("lora: {r: 0}", "needs a number >= 1, got 0"),
        ("lora: {lora_alpha: 0}", "needs a number > 0.0, got 0"),
        ("lora: {lora_dropout: 1}", "needs a number < 1.0, got 1"),
        ("lora: {use_rslora: yes}", "needs true or false, got the text 'yes'"),
        ("lora: {init_lora_weights: 1}", "needs true or a word, got the number 1"),
        ("lora: {init_lora_weights: false}", "needs true or `gaussian`, got false"),
        ("lora: {target_modules: 3}", "needs text or a list, got 3"),
        ("lora: {target_modules: []}", "needs text or at least 1 entry, got a list of 0"),
        ("lora: {target_modules: ' '}", "needs text that is not empty, got ' '"),
        ("lora: {layers_to_transform: []}", "needs at least one layer, got an empty list"),
        ("log: {report_to: jsonl}", "needs a list, got the text 'jsonl'"),
    ],
)
def test_wrong_value_says_what_came_and_what_was_needed(write, text, expected):
    found = problem(write(MINIMAL + text + "\n"))
    assert found.startswith("run.yaml:4: ")
    assert found.split(": ", 2)[2] == expected


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("lora: {target_modules: '(q_proj'}", "run.yaml:4: lora.target_modules: "),
        ("lora: {exclude_modules: '*'}", "run.yaml:4: lora.exclude_modules: "),
        ("lora: {rank_pattern: {'q(': 4}}", "run.yaml:4: lora.rank_pattern: "),
        ("lora: {alpha_pattern: {'q(': 4}}", "run.yaml:4: lora.alpha_pattern: "),
    ],
)
def test_patterns_must_be_regular_expressions(write, text, start):
    assert problem(write(MINIMAL + text)).startswith(start + "needs a regular expression, got ")


def test_wrong_entry_of_a_list_is_named_by_its_index(write):
    found = problem(write(MINIMAL + "lora:\n  layers_to_transform:\n  - 1\n  - x\n"))
    assert found == "run.yaml:7: lora.layers_to_transform.1: needs a whole number, got the text 'x'"


# Values that do not go together.


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("train: {warmup_ratio: 0.1, warmup_steps: 3}", "train.warmup_ratio"),
        ("train: {lr_scheduler_type: constant, warmup_steps: 3}", "train.warmup_steps"),
        ("train: {lr_scheduler_kwargs: {power: 2}}", "train.lr_scheduler_kwargs.power"),
        ("train: {lr_scheduler_type: wsd}", "train.lr_scheduler_type"),
        ("train: {lr_scheduler_type: cosine_with_min_lr}", "train.lr_scheduler_type"),
        (
            "train: {lr_scheduler_type: polynomial, lr_scheduler_kwargs: {lr_end: 1}}",
            "train.lr_scheduler_kwargs.lr_end",
        ),
        ("lora: {layers_pattern: layers}", "lora.layers_pattern"),
        ("eval: {strategy: epoch}", "eval.strategy"),
        ("eval: {exact_match: true}", "eval.exact_match"),
        ("eval: {early_stopping_patience: 1}", "eval.early_stopping_patience"),
        ("train: {method: full}\nlora: {r: 4}", "lora"),
    ],
)
def test_conflicting_values_are_refused(write, text, key):
    assert f": {key}: " in problem(write(MINIMAL + text + "\n"))


@pytest.mark.parametrize(
    ("before", "after", "key"),
    [
        ("rows.jsonl", "a.jsonl, response_part: x", "data.response_part"),
        ("rows.jsonl", "a.jsonl, chat_template: chatml", "data.chat_template"),
        ("output_dir: out", "output_dir: out, export: [peft, peft]", "save.export"),
        ("output_dir: out", "output_dir: out, load_best_model_at_end: true", "load_best"),
    ],
)
def test_conflicts_in_required_sections_are_refused(write, before, after, key):
    assert key in problem(write(MINIMAL.replace(before, after)))


@pytest.mark.parametrize("text", ["eval: {early_stopping_patience: 1}", "log: {}"])
def test_best_model_needs_evaluations_during_the_run(write, text):
    best = "output_dir: out, load_best_model_at_end: true"
    path = write(
        MINIMAL.replace("rows.jsonl", "a, eval: b").replace("output_dir: out", best) + text
    )
    assert all("set eval.strategy to steps or epoch" in found for found in problems(path))
    load_config(path, ["eval.strategy=epoch"])


def test_conflicts_of_a_section_come_together(write):
    text = "train: {warmup_ratio: 0.1, warmup_steps: 3, lr_scheduler_kwargs: {timescale: 2}}\n"
    assert len(problems(write(MINIMAL + text))) == 2


def test_full_fine_tuning_exports_merged_weights_only(write):
    path = write(MINIMAL.replace("out}", "out, export: [peft]}") + "train: {method: full}\n")
    assert problem(path) == (
        "run.yaml:3: save.export: train.method `full` can only export `merged`, got peft"
    )
    config = RunConfig(
        model=ModelConfig(name_or_path="tiny"),
        data={"train": "rows.jsonl"},  # pyright: ignore[reportArgumentType]
        train=TrainConfig(method="full"),
        save=SaveConfig(output_dir="out"),
    )
    assert config.save.export == ("merged",)


# Files that are no config.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "run.yaml: the file is empty"),
        (b"# only a comment\n", "run.yaml: the file is empty"),
        (b"- a\n- b\n", "run.yaml:1: needs sections such as `model:` and `data:`, got a list of 2"),
        (b"\njust text\n", "run.yaml:2: needs sections"),
        (b"model:\n\tname_or_path: x\n", "run.yaml:2: not valid YAML: indented with a tab"),
        (b"model: {a: 1\nsave: 3\n", "run.yaml:2: not valid YAML: "),
        (b"model: a\n---\nmodel: b\n", "run.yaml:2: not valid YAML: "),
        (b"model: a\nsave: \xff\n", "run.yaml:2: needs UTF-8, got byte 0xff"),
        (b"model: a\nsave: \x01\n", "run.yaml:2: not valid YAML: special characters"),
        (b"model: &a {b: 1}\nsave: *a\n", "run.yaml:1: not valid YAML: anchors and aliases"),
        (b"model: &a [*a]\n", "run.yaml:1: not valid YAML: anchors and aliases"),
        (b"model: !!python/name:os.system x\n", "run.yaml:1: not valid YAML: "),
        (b"a: 2024-13-45\n", "run.yaml: not valid YAML: month must be in 1..12"),
        (b"a: " + b"[" * 20000, "run.yaml: nested too deeply"),
    ],
)
def test_unusable_file_says_why(write, text, expected):
    assert problem(write(text)).startswith(expected)


def test_byte_order_mark_is_not_part_of_the_first_key(write):
    load_config(write(b"\xef\xbb\xbf" + MINIMAL.encode()))


def test_file_that_cannot_be_read_is_named(tmp_path):
    assert "No such file" in problem(tmp_path / "absent.yaml")
    assert "Is a directory" in problem(tmp_path)


# Overrides.


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


# Overrides that are text.

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


# From Python.


def test_lora_config_takes_lists_and_tuples():
    assert LoraConfig(r=8, target_modules=["q_proj"]) == LoraConfig(  # pyright: ignore[reportArgumentType]
        r=8, target_modules=("q_proj",)
    )
    assert LoraConfig(modules_to_save=["lm_head"]).modules_to_save == ("lm_head",)  # pyright: ignore[reportArgumentType]
    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[0, 2])  # pyright: ignore[reportArgumentType]
    assert config.layers_to_transform == (0, 2)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 0}, "greater than or equal to 1"),
        ({"task_type": "CAUSAL_LM"}, "task_type"),
        ({"target_modules": "("}, "needs a regular expression"),
        ({"layers_pattern": "h"}, "is only read together with layers_to_transform"),
    ],
)
def test_lora_config_from_python_raises_a_readable_value_error(settings, words):
    with pytest.raises(ValueError, match=words):
        LoraConfig(**settings)


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


# Whatever comes, in words.

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
