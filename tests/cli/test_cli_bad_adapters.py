"""Bad adapters and targets: one readable message, exit code 2, and nothing written or changed."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.cli.damage import LFS_POINTER, edit_json, edit_tensors

pytestmark = pytest.mark.slow


ADAPTER_A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


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
    "BD-LoRA": (
        "validate",
        edit_adapter_config(use_bdlora=True),
        r"adapter_config.json: use_bdlora=True is not supported; .*merge with PEFT",
    ),
    "DoRA without magnitudes": (
        "validate",
        edit_adapter_config(use_dora=True),
        r"adapter_model.safetensors lacks \d+ tensors, first .*q_proj.lora_magnitude_vector",
    ),
    "DoRA with a bias": (
        "validate",
        edit_adapter_config(use_dora=True, lora_bias=True),
        r"adapter_config.json: lora_bias: does not go with use_dora, as in PEFT",
    ),
    "CorDA": (
        "validate",
        edit_adapter_config(init_lora_weights="corda"),
        r"adapter_config.json: init_lora_weights='corda' changes the base weights .*convert",
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
    "module without a weight to multiply by": (
        ["lora.target_modules=[q_proj, input_layernorm]"],
        r"input_layernorm.* cannot carry an adapter: only layers that multiply by a weight can",
    ),
    "bias of an embedding": (
        ["lora.target_modules=[q_proj, embed_tokens]", "lora.lora_bias=true"],
        r"model.embed_tokens cannot carry lora_bias: an embedding's update has no bias",
    ),
    "DoRA of a tied embedding": (
        ["lora.target_modules=[q_proj, embed_tokens]", "lora.use_dora=true"],
        r"save.export \(.* as peft\): model.embed_tokens is lm_head too .*: use plain LoRA, leave",
    ),
    "bias that no layer takes in": (
        ["lora.lora_bias=true", "save.export=[merged]"],
        r"save.export: merged cannot hold the lora_bias of .*, which has no bias of its own",
    ),
    "bias in a portable export": (
        ["lora.lora_bias=true", "save.export=[peft-portable]"],
        r"save.export: peft-portable holds A and B only, but lora_bias .*; export peft or merged",
    ),
    "DoRA in a portable export": (
        ["lora.use_dora=true", "save.export=[peft-portable, merged]"],
        r"save.export: peft-portable holds A and B only, but DoRA .*; export peft or merged",
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
