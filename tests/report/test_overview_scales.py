"""The scale that is printed for a module is the one that its layers and PEFT compute with."""

import io
import re

import peft
import pytest
from peft.tuners.lora import LoraLayer
from rich.console import Console
from transformers import AutoModelForCausalLM

import lorax
from lorax.adapters.nnx.tree import adapted_layers
from lorax.report.overview import module_rows
from lorax.report.screen import print_modules
from lorax.runs.checks import check_targets
from lorax.runs.model import Blueprint

BASE = "examples/tiny/model"
SETTINGS = {
    "an alpha of its own": dict(alpha_pattern={"v_proj": 4}),
    "a rank of its own": dict(rank_pattern={"v_proj": 2}),
    "both": dict(rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 4}),
    "of one layer": dict(alpha_pattern={"layers.1.self_attn.v_proj": 4}),
    "over a root": dict(use_rslora=True, rank_pattern={"v_proj": 16}, alpha_pattern={"q_proj": 1}),
    "two patterns": dict(alpha_pattern={".*q_proj": 4, "v_proj": 2}),
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("from_adapter", [False, True], ids=["settings", "adapter"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_printed_scale_is_that_of_the_layers_and_of_peft(tmp_path, name, from_adapter):
    settings = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]) | SETTINGS[name]
    base = AutoModelForCausalLM.from_pretrained(BASE)
    theirs = peft.get_peft_model(base, peft.LoraConfig(**settings))
    expected = {
        layer_name.removeprefix("base_model.model."): layer.scaling["default"]
        for layer_name, layer in theirs.named_modules()
        if isinstance(layer, LoraLayer)
    }
    overrides = [f"lora.{key}={value}".replace("True", "true") for key, value in settings.items()]
    if from_adapter:
        theirs.save_pretrained(tmp_path / "adapter")
        overrides = ["lora=null", f"model.adapter={tmp_path / 'adapter'}"]
    config = lorax.load_config("configs/tiny_cpu.yaml", overrides)
    layers = adapted_layers(lorax.build_model(config))
    assert {
        layer_name: layer.adapter.spec.scale for layer_name, layer in layers.items()
    } == expected
    console = Console(file=io.StringIO(), width=200)
    print_modules(console, module_rows(check_targets(Blueprint.of(config))), None)
    found = re.findall(
        r"self_attn\.(\w+) +(\d+) .* ([\d.]+) +[\d,]+ *$", console.file.getvalue(), re.M
    )
    printed = sorted(
        (kind, float(scale)) for kind, count, scale in found for _ in range(int(count))
    )
    assert printed == sorted((key.rpartition(".")[2], scale) for key, scale in expected.items())
