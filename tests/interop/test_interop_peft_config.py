"""adapter_config.json against the installed PEFT: what loads as plain LoRA, and what is refused."""

import json
import re
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from peft import (
    EvaConfig,
    LoraGAConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.lora.config import (
    BdLoraConfig,
    KasaConfig,
    MontecloraConfig,
    VeloraConfig,
)
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lorax
from lorax.interop.load import load_model
from lorax.interop.peft import check_adapter, load_adapter, save_adapter
from lorax.interop.peft_config import (
    AdapterError,
    adapter_notes,
    read_adapter_config,
    read_base_name,
)

TOKENS = np.arange(22).reshape(2, 11) * 4 % 96
TARGETS = ["q_proj", "v_proj"]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("base") / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded_base(base):
    return load_model(base, dtype=jnp.float32)


def torch_base(base) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def torch_logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def relative(actual, expected):
    return np.linalg.norm(np.asarray(actual) - expected) / np.linalg.norm(expected)


def trained(model):
    """Moves everything that trains, as training would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def peft_model(base, **settings):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **settings}
    return get_peft_model(torch_base(base), PeftLoraConfig(task_type="CAUSAL_LM", **settings))


def save(model, folder):
    model.save_pretrained(folder)
    return folder


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    """An adapter of PEFT, and its logits there."""
    model = trained(peft_model(base))
    return save(model, tmp_path_factory.mktemp("plain") / "adapter"), torch_logits(model)


@pytest.fixture
def adapter(plain, tmp_path):
    """A copy of it, to be changed."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in plain[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


# What was an initialisation is trained now.


def test_an_adapter_that_eva_initialised_loads(base, loaded_base, tmp_path):
    eva = EvaConfig(rho=2.0, tau=0.5)
    targets = ["q_proj", "o_proj", "down_proj"]
    model = peft_model(base, init_lora_weights="eva", eva_config=eva, target_modules=targets)
    torch.manual_seed(2)
    batches = [{"input_ids": torch.randint(0, 96, (4, 16))} for _ in range(3)]
    initialize_lora_eva_weights(model, batches)
    trained(model)
    folder = save(model, tmp_path / "eva")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["init_lora_weights"] == "eva" and config["eva_config"]["rho"] == 2.0
    assert config["rank_pattern"]  # EVA gives each layer a rank of its own
    logits = load_adapter(loaded_base, folder)(jnp.asarray(TOKENS))
    assert relative(logits, torch_logits(model)) <= 1e-5
    assert not adapter_notes(folder)


PLAIN = {
    "gaussian": dict(init_lora_weights="gaussian"),
    "gaussian in capitals": dict(init_lora_weights="GAUSSIAN"),
    "orthogonal": dict(init_lora_weights="orthogonal"),
    "false": dict(init_lora_weights=False),
    "0 for false": dict(init_lora_weights=0),
    "nothing for false": dict(init_lora_weights=""),
    "mica": dict(init_lora_weights="mica"),
    "conv1d's layout": dict(fan_in_fan_out=True),
    "empty lists": dict(modules_to_save=[], exclude_modules=[], layers_to_transform=[]),
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_computes_as_plain_lora_loads(base, loaded_base, tmp_path, name):
    model = trained(peft_model(base, **PLAIN[name]))
    folder = edit(save(model, tmp_path / "theirs"), **PLAIN[name])  # PEFT mends some on saving
    logits = load_adapter(loaded_base, folder)(jnp.asarray(TOKENS))
    assert relative(logits, torch_logits(model)) <= 1e-5
    assert (
        relative(torch_logits(PeftModel.from_pretrained(torch_base(base), folder)), logits) < 1e-5
    )


@pytest.mark.parametrize(
    "setting, note",
    [
        ({"init_lora_weights": "mica"}, "MiCA trained A alone; lorax trains A and B"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is not read"),
    ],
)
def test_what_differs_without_changing_the_result_is_told(adapter, setting, note):
    assert not adapter_notes(adapter)
    (told,) = adapter_notes(edit(adapter, **setting))
    assert "adapter_config.json: " in told and note in told


@pytest.mark.parametrize("field", ["eva_config", "corda_config", "lora_ga_config", "loftq_config"])
def test_the_settings_of_an_initialisation_are_neutral_beside_a_plain_one(
    plain, loaded_base, adapter, field
):
    """As in an adapter that PEFT converted on saving: it says init_lora_weights: true."""
    edit(adapter, **{field: {"a": 1}})
    assert relative(load_adapter(loaded_base, adapter)(jnp.asarray(TOKENS)), plain[1]) <= 1e-5


def test_a_pissa_adapter_that_peft_converted_loads(base, loaded_base, tmp_path):
    model = peft_model(base, init_lora_weights="pissa")
    save(model, tmp_path / "initial")
    trained(model).save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    logits = load_adapter(loaded_base, tmp_path / "converted")(jnp.asarray(TOKENS))
    assert relative(logits, torch_logits(model)) <= 1e-5


@pytest.mark.parametrize("number", [1, 1.0, 2])
def test_a_number_as_initialisation_is_refused_as_peft_fails_with_it(adapter, base, number):
    edit(adapter, init_lora_weights=number)
    with pytest.raises(AttributeError):
        PeftModel.from_pretrained(torch_base(base), adapter)
    with pytest.raises(AdapterError, match=rf"init_lora_weights must be .*, got {number}, with wh"):
        read_adapter_config(adapter)
    assert read_adapter_config(edit(adapter, init_lora_weights=True)).r  # the remedy


CHANGED_BASES = ("pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "lora_ga", "loftq", "later")


@pytest.mark.parametrize("value", CHANGED_BASES)
def test_an_adapter_of_a_changed_base_is_refused(adapter, value):
    expected = rf"adapter_config.json: init_lora_weights='{value}' changes the base weights .*; "
    with pytest.raises(AdapterError, match=expected):
        read_adapter_config(edit(adapter, init_lora_weights=value, lora_ga_config={}))


def test_lora_ga_is_not_said_to_be_mended_by_merging(base, adapter, tmp_path):
    """PEFT itself loads one onto the base as it is, and computes something else."""
    model = peft_model(base, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    for layer in model.modules():
        if hasattr(layer, "lora_ga_init"):
            inner: Any = layer
            inner.get_base_layer()._peft_loraga_grad = torch.randn_like(inner.weight)
            inner.lora_ga_init("default", LoraGAConfig())
    folder = save(trained(model), tmp_path / "lora_ga")
    merged: Any = PeftModel.from_pretrained(torch_base(base), folder)
    assert relative(torch_logits(merged.merge_and_unload()), torch_logits(model)) > 0.1
    with pytest.raises(AdapterError, match="convert it where it was trained") as refused:
        read_adapter_config(folder)
    assert "merge" not in str(refused.value)


# Other methods than plain LoRA: refused, and the remedy works.

OTHER_METHODS = {
    "use_dora": True,
    "kasa_config": KasaConfig(),
    "velora_config": VeloraConfig(num_groups=4),
    "monteclora_config": MontecloraConfig(),
    "use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"]),
    "trainable_token_indices": [1, 2],
    "target_parameters": ["up_proj.weight"],
    "init_lora_weights": "pissa",
    "alora_invocation_tokens": [3, 4],
    "layer_replication": [[0, 2], [1, 2]],
    "lora_bias": True,
}
NOT_MERGED = ("alora_invocation_tokens", "layer_replication", "lora_bias")


@pytest.mark.parametrize("field", OTHER_METHODS)
def test_another_method_is_refused_with_a_remedy_that_works(base, tmp_path, field):
    if field == "use_bdlora":
        OTHER_METHODS[field].nblocks = 2
    model = trained(peft_model(base, **{field: OTHER_METHODS[field]}))
    folder = save(model, tmp_path / "theirs")
    with pytest.raises(AdapterError, match=rf"adapter_config.json: {field}=") as refused:
        read_adapter_config(folder)
    assert "remove" not in str(refused.value)
    again: Any = PeftModel.from_pretrained(torch_base(base), folder)
    assert relative(torch_logits(again), torch_logits(model)) <= 1e-5
    if field in NOT_MERGED:
        assert "PEFT cannot merge it" in str(refused.value)
        with pytest.raises((NotImplementedError, RuntimeError, AssertionError)):
            assert relative(torch_logits(again.merge_and_unload()), torch_logits(model)) <= 1e-5
    else:
        assert "merge with PEFT" in str(refused.value)
        assert relative(torch_logits(again.merge_and_unload()), torch_logits(model)) <= 1e-5


def test_the_remedy_for_alora_does_not_change_the_result(base, tmp_path):
    """To remove the field would: every token would be adapted."""
    model = trained(peft_model(base, alora_invocation_tokens=[3, 4]))
    folder = save(model, tmp_path / "theirs")
    with pytest.raises(AdapterError, match="without this field all would be"):
        read_adapter_config(folder)
    without = PeftModel.from_pretrained(
        torch_base(base), edit(folder, alora_invocation_tokens=None)
    )
    assert relative(torch_logits(without), torch_logits(model)) > 0.1


@pytest.mark.parametrize("field", ["arrow_config", "use_qalora", "surprise"])
def test_a_field_that_may_change_the_result_is_not_said_to_be_removable(adapter, field):
    with pytest.raises(AdapterError, match=rf"{field}=.* is not supported; .*PEFT") as refused:
        read_adapter_config(edit(adapter, **{field: {"a": 1}}))
    assert "remove" not in str(refused.value)


@pytest.mark.parametrize("value", [0, 0.0])
def test_a_number_of_zero_switches_only_a_known_method_off(adapter, value):
    read_adapter_config(edit(adapter, use_dora=value))
    with pytest.raises(AdapterError, match=rf"newmethod_scale={value} is not supported"):
        read_adapter_config(edit(adapter, newmethod_scale=value))


def test_all_that_is_wrong_is_said_at_once(adapter):
    edit(adapter, use_dora=True, surprise=3, base_model_name_or_path=5)
    with pytest.raises(AdapterError) as refused:
        read_adapter_config(adapter)
    for field in ("use_dora=True", "surprise=3", "base_model_name_or_path must be text"):
        assert field in str(refused.value)


# Values of other types and sizes.

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


# One check of the tensors, whether their data are read or not.

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


# Modules that are trained whole are named as in PEFT.

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
