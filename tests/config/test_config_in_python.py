"""Settings made in Python: refused in the words that a file's are."""

import inspect

import pytest

import lorax
from lorax import DataConfig, LoraConfig, TrainConfig
from lorax.config.explain import ConfigError


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: LoraConfig(rank=4), "LoraConfig: rank: unknown key; did you mean r?"),  # pyright: ignore
        (
            lambda: LoraConfig(lora_alhpa=4),  # pyright: ignore
            "LoraConfig: lora_alhpa: unknown key; did you mean lora_alpha?",
        ),
        (
            lambda: LoraConfig(target_modules=[]),  # pyright: ignore
            "LoraConfig: target_modules: needs text or at least 1 entry, got a list of 0",
        ),
        (
            lambda: LoraConfig(task_type="CAUSAL_LM"),  # pyright: ignore
            "LoraConfig: task_type: unknown key; lorax writes it into adapter_config.json itself: "
            "leave it out",
        ),
        (
            lambda: LoraConfig(target_modules="("),
            "LoraConfig: target_modules: needs a regular expression, got '(': missing ), "
            "unterminated subpattern at position 0",
        ),
        (
            lambda: LoraConfig(rank_pattern={"q": 0}),
            "LoraConfig: rank_pattern.q: needs a number >= 1, got 0",
        ),
        (
            lambda: TrainConfig(optim="adam", lr=1),  # pyright: ignore
            "TrainConfig: lr: unknown key; did you mean learning_rate?\n"
            "TrainConfig: optim: needs `adamw`, `lion`, `sgd` or `adafactor`, got the text 'adam'; "
            "did you mean adamw?",
        ),
        (
            lambda: DataConfig(train=({"path": "a", "weigth": 3},)),  # pyright: ignore
            "DataConfig: train.0.weigth: unknown key; the keys of train.0 are path, name, split, "
            "field",
        ),
        (
            lambda: DataConfig(),  # pyright: ignore
            "DataConfig: train: missing: this key has no default, set it",
        ),
        (
            lambda: LoraConfig(layers_pattern="h"),
            "LoraConfig: layers_pattern: is only read together with layers_to_transform: set both",
        ),
    ],
)
def test_what_is_wrong_is_said_in_our_words(make, said):
    with pytest.raises(ConfigError) as raised:
        make()
    assert str(raised.value) == said


def test_settings_are_given_by_name():
    with pytest.raises(TypeError, match=r"LoraConfig takes its settings by name, such as r=…"):
        LoraConfig(8)  # pyright: ignore


def test_the_signature_is_of_plain_types():
    text = str(inspect.signature(LoraConfig))
    assert text.startswith("(*, r: int = 16, lora_alpha: float = 16.0, ")
    assert "Annotated" not in text


@pytest.mark.parametrize("overrides", ["lora.r=8", {8: 1}])
def test_overrides_are_a_list(overrides):
    with pytest.raises(TypeError, match=r"overrides must be a list such as \['lora\.r=8'\], got"):
        lorax.load_config("configs/tiny_cpu.yaml", overrides)


def test_a_config_is_read_from_a_path():
    with pytest.raises(TypeError, match=r"path must be that of a YAML file, got {'r': 8}"):
        lorax.load_config({"r": 8})  # pyright: ignore
