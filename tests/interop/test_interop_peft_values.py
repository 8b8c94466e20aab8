"""Values, headers and modules_to_save of an adapter: taken as PEFT does, or refused in words."""

import re
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from peft import (
    PeftModel,
)
from safetensors.numpy import load_file, save_file

import lorax
from lorax.interop.peft import check_adapter, load_adapter, save_adapter
from lorax.interop.peft_config import (
    AdapterError,
    read_adapter_config,
    read_base_name,
)
from tests.interop.peft_adapters import (
    TOKENS,
    edit,
    peft_model,
    relative,
    save,
    torch_base,
    torch_logits,
    trained,
)

pytestmark = pytest.mark.filterwarnings("ignore")


VALUES = {
    "rank of 400 digits": (dict(r=10**400), "r: needs a number <= 2147483647, got a number of"),
    "rank of a pattern": (
        dict(rank_pattern={"q_proj": 10**400}),
        "rank_pattern.q_proj: needs a number <= 2147483647",
    ),
    "alpha beyond floats": (dict(lora_alpha=10**400), "lora_alpha: needs .*, got a number of"),
    "infinite alpha": (dict(lora_alpha=float("inf")), "lora_alpha: needs a finite number"),
    "alpha of a pattern": (
        dict(alpha_pattern={"q_proj": 10**400}),
        "alpha_pattern.q_proj: needs .*, got a number of",
    ),
    "alpha of a pattern as text": (
        dict(alpha_pattern={"q_proj": "x"}),
        "alpha_pattern.q_proj: needs a number, got the text 'x'",
    ),
    "text": (dict(r="four"), "r: needs a whole number, got the text 'four'"),
    "null in a list": (
        dict(target_modules=["q_proj", None]),
        r"target_modules.1: needs text, got nothing \(null\)",
    ),
    "dropout": (dict(lora_dropout=2), "lora_dropout: needs a number < 1.0, got 2"),
    "no method": (dict(peft_type=None), "peft_type must be LORA, got null"),
    "method as list": (dict(peft_type=["LORA"]), "peft_type must be LORA, got "),
    "initialisation as list": (
        dict(init_lora_weights=["eva"]),
        r"init_lora_weights must be true, false, null or a name, got \['eva'\].* write true",
    ),
    "1 for true": (dict(use_rslora=1), "use_rslora: needs true or false, got 1"),
    "true for 1": (dict(r=True), "r: needs a whole number, got true"),
    "true for an alpha": (dict(lora_alpha=True), "lora_alpha: needs a number, got true"),
    "base as number": (
        dict(base_model_name_or_path=7),
        "base_model_name_or_path must be text or null, got 7",
    ),
    "base as list": (dict(base_model_name_or_path=["a"]), "base_model_name_or_path must be text"),
    "revision as object": (dict(revision={"a": 1}), "revision must be text or null"),
    "a long value": (dict(surprise="x" * 20_000), r"surprise='x+'… \(19,900 characters more\)"),
    "a long name": (dict(**{"y" * 20_000: 1}), r"y+… \(19,900 characters more\)=1"),
    "a long pattern": (dict(rank_pattern={"(" * 20_000: 1}), "rank_pattern: needs a regular expr"),
    "a NUL": (
        dict(target_modules=["a\0b"]),
        r"target_modules.0: needs text without a NUL .*'a\\x00b'$",
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_that_cannot_be_is_refused_in_words(adapter, name):
    changes, expected = VALUES[name]
    with pytest.raises(AdapterError, match=rf"adapter_config.json: {expected}") as refused:
        read_adapter_config(edit(adapter, **changes))
    assert len(str(refused.value)) < 1000
    assert not re.search("NoneType|Input should|something else", str(refused.value))


def test_the_name_of_the_base_is_text_or_nothing(adapter, base):
    assert read_base_name(adapter) == (str(base), None)
    assert read_base_name(edit(adapter, base_model_name_or_path=None)) == (None, None)
    with pytest.raises(AdapterError, match="base_model_name_or_path must be text or null, got 5"):
        read_base_name(edit(adapter, base_model_name_or_path=5))


A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


HEAD = "base_model.model.lm_head.weight"


def change(tensors, **changes):
    return {k: v for k, v in (tensors | changes).items() if v is not None}


TENSORS = {
    "unknown": (lambda t: change(t, x=t[A0]), "has unexpected 1 tensors, first x"),
    "unknown weight of the base": (
        lambda t: change(t, **{HEAD: np.zeros((96, 32), np.float32)}),
        f"has unexpected 1 tensors, first {re.escape(HEAD)}",
    ),
    "missing": (lambda t: change(t, **{A0: None}), "lacks 1 tensors, first "),
    "misshapen": (lambda t: change(t, **{A0: t[A0][:2].copy()}), r"shape \(2, 32\), needed \(4"),
    "misshapen copy of the base": (
        lambda t: change(t, **{A0.replace("lora_A", "base_layer"): t[A0]}),
        r"base_layer.weight has shape \(4, 32\), needed \(32, 32\)",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_headers_and_tensors_are_refused_alike(adapter, loaded_base, name):
    damage, expected = TENSORS[name]
    path = adapter / "adapter_model.safetensors"
    save_file(damage(load_file(path)), path)
    config = read_adapter_config(adapter)
    shapes = nnx.eval_shape(lambda: lorax.apply_lora(loaded_base, config, rngs=nnx.Rngs(0)))
    for look in (
        lambda: check_adapter(shapes, adapter),
        lambda: load_adapter(loaded_base, adapter),
    ):
        with pytest.raises(AdapterError, match=expected):
            look()


def test_the_headers_of_a_good_adapter_pass(base, loaded_base, tmp_path):
    config = lorax.LoraConfig(r=4, target_modules=("q_proj",), modules_to_save=("norm",))
    adapted = lorax.apply_lora(loaded_base, config, rngs=nnx.Rngs(0))
    save_adapter(adapted, tmp_path / "out")
    read = read_adapter_config(tmp_path / "out")
    shapes = nnx.eval_shape(lambda: lorax.apply_lora(loaded_base, read, rngs=nnx.Rngs(0)))
    assert (
        check_adapter(shapes, tmp_path / "out").keys()
        == load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
    )


SAVED = [
    ["norm"],
    ["layernorm"],
    ["input_layernorm"],
    ["model.norm"],
    ["m"],
    ["0.post_attention_layernorm"],
    ["head"],
    ["tokens"],
    ["mlp"],
    ["1.mlp", "norm", "lm_head"],
    ["k_proj"],
    ["rm"],
]


@pytest.mark.parametrize("entries", SAVED, ids=str)
def test_modules_to_save_takes_what_peft_takes(base, loaded_base, tmp_path, entries):
    settings = dict(target_modules=["q_proj"], modules_to_save=entries)
    model = trained(peft_model(base, **settings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = save(model, tmp_path / "theirs")
    adapted = load_adapter(loaded_base, folder)
    assert relative(adapted(jnp.asarray(TOKENS)), torch_logits(model)) <= 1e-5
    save_adapter(adapted, tmp_path / "ours", base_model_name_or_path=str(base))
    theirs = load_file(folder / "adapter_model.safetensors")
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    again = PeftModel.from_pretrained(torch_base(base), tmp_path / "ours")
    assert relative(torch_logits(again), torch_logits(model)) <= 1e-5


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(modules_to_save=["proj"]), "'proj' ends the name of .*q_proj, as PEFT compares"),
        (dict(modules_to_save=["attn"]), "ends the name of model.layers.0.self_attn, .*q_proj"),
        (dict(modules_to_save=["el"]), "'el' ends the name of model, as PEFT"),
        (
            dict(target_modules=["lm_head"], modules_to_save=["head"]),
            "'head' ends the name of lm_head",
        ),
        (dict(modules_to_save=["mlp", "up_proj"]), "'mlp' ends .* and 'up_proj' that of .*in it"),
        (dict(modules_to_save=["nrom"]), "'nrom' matches no module; did you mean .*norm"),
        (dict(modules_to_save=["layers.0.*norm"]), "matches no module"),
    ],
)
def test_what_peft_would_train_twice_is_refused(loaded_base, settings, message):
    config = lorax.LoraConfig(**{"target_modules": ["q_proj"], **settings})
    with pytest.raises(
        lorax.adapters.targets.TargetError, match=f"lora.modules_to_save: .*{message}"
    ):
        lorax.apply_lora(loaded_base, config, rngs=nnx.Rngs(0))


def test_the_remedy_for_what_would_be_trained_twice_works(loaded_base):
    config = lorax.LoraConfig(
        target_modules=("q_proj", "up_proj"),
        modules_to_save=("attn",),
        exclude_modules=("q_proj",),
    )
    assert lorax.apply_lora(loaded_base, config, rngs=nnx.Rngs(0))
