"""Configs: defaults, values, conflicts and files, and what is said of them."""

from typing import Any

import pytest
from pydantic import ValidationError

from lorax.config.model import ModelConfig
from lorax.config.run import RunConfig, SaveConfig, dump_config, load_config
from lorax.config.schema import FAMILIAR
from lorax.config.train import TrainConfig
from tests.config.minimal import MINIMAL, problem, problems


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


STARTS = "needs true, gaussian, orthogonal, pissa, pissa_niter_ with a number, olora or eva"


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
        ("train: {loraplus_lr_ratio: 0.5}", "needs a number >= 1.0, got 0.5"),
        ("train: {modules_to_save_learning_rate: 0}", "needs a number > 0.0, got 0"),
        ("train: {neftune_noise_alpha: -5}", "needs a number > 0.0, got -5"),
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
        ("lora: {init_lora_weights: 1}", f"{STARTS}, got 1"),
        ("lora: {init_lora_weights: false}", f"{STARTS}, got false"),
        ("lora: {init_lora_weights: pisa}", f"{STARTS}, got 'pisa' (did you mean pissa?)"),
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
        ("train: {loraplus_lr_embedding: 1e-5}", "train.loraplus_lr_embedding"),
        ("train: {method: full, loraplus_lr_ratio: 16}", "train.loraplus_lr_ratio"),
        (
            "train: {method: full, modules_to_save_learning_rate: 1e-5}",
            "train.modules_to_save_learning_rate",
        ),
        (
            "train: {modules_to_save_learning_rate: 1e-5}",
            "train.modules_to_save_learning_rate",
        ),
        ("eval: {strategy: epoch}", "eval.strategy"),
        ("eval: {exact_match: true}", "eval.exact_match"),
        ("eval: {early_stopping_patience: 1}", "eval.early_stopping_patience"),
        ("train: {method: full}\nlora: {r: 4}", "lora"),
    ],
)
def test_conflicting_values_are_refused(write, text, key):
    assert f": {key}: " in problem(write(MINIMAL + text + "\n"))


@pytest.mark.parametrize(
    "text",
    [
        "train: {loraplus_lr_ratio: 16, loraplus_lr_embedding: 1e-5}",
        "train: {modules_to_save_learning_rate: 1e-5}\nlora: {modules_to_save: [norm]}",
        "train: {method: full, neftune_noise_alpha: 5}",
    ],
)
def test_settings_that_need_each_other_are_taken_together(write, text):
    load_config(write(MINIMAL + text + "\n"))


def test_an_adapter_brings_its_own_modules_that_are_trained_whole(write):
    base = MINIMAL.replace("model: {", "model: {adapter: folder, ")
    load_config(write(base + "train: {modules_to_save_learning_rate: 1e-5}\n"))


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
