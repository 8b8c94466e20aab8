"""adapter_config.json against the installed PEFT: what loads as plain LoRA, and what is refused."""

import json
from typing import Any

import jax.numpy as jnp
import pytest
import torch
from peft import (
    EvaConfig,
    LoraGAConfig,
    PeftModel,
    initialize_lora_eva_weights,
)
from peft.tuners.lora.config import (
    BdLoraConfig,
    KasaConfig,
    MontecloraConfig,
    VeloraConfig,
)

from lorax.interop.peft import load_adapter, save_adapter
from lorax.interop.peft_config import (
    AdapterError,
    adapter_notes,
    read_adapter_config,
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


@pytest.mark.parametrize("start", ["pissa", "olora", "OLoRA"])
def test_a_start_that_peft_repeats_on_loading_is_repeated(base, loaded_base, tmp_path, start):
    model = trained(peft_model(base, init_lora_weights=start))
    folder = save(model, tmp_path / "theirs")
    ours = load_adapter(loaded_base, folder)
    assert relative(ours(jnp.asarray(TOKENS)), torch_logits(model)) <= 1e-5
    save_adapter(ours, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["r"] == 2 * model.peft_config["default"].r and config["init_lora_weights"] is True
    again: Any = PeftModel.from_pretrained(torch_base(base), tmp_path / "ours")
    assert relative(torch_logits(again), torch_logits(model)) <= 1e-5


def test_tokens_that_peft_trained_load(base, loaded_base, tmp_path):
    model = trained(peft_model(base, trainable_token_indices=[5, 2]))
    ours = load_adapter(loaded_base, save(model, tmp_path / "theirs"))
    assert relative(ours(jnp.asarray(TOKENS)), torch_logits(model)) <= 1e-5


CHANGED_BASES = ("pissa_niter_4", "corda", "lora_ga", "loftq", "later")


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


OTHER_METHODS = {
    "kasa_config": KasaConfig(),
    "velora_config": VeloraConfig(num_groups=4),
    "monteclora_config": MontecloraConfig(),
    "use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"]),
    "target_parameters": ["up_proj.weight"],
    "alora_invocation_tokens": [3, 4],
    "layer_replication": [[0, 2], [1, 2]],
}


NOT_MERGED = ("alora_invocation_tokens", "layer_replication")


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
    read_adapter_config(edit(adapter, use_qalora=value))
    with pytest.raises(AdapterError, match=rf"newmethod_scale={value} is not supported"):
        read_adapter_config(edit(adapter, newmethod_scale=value))


def test_all_that_is_wrong_is_said_at_once(adapter):
    edit(adapter, use_bdlora=True, surprise=3, base_model_name_or_path=5)
    with pytest.raises(AdapterError) as refused:
        read_adapter_config(adapter)
    for field in ("use_bdlora=True", "surprise=3", "base_model_name_or_path must be text"):
        assert field in str(refused.value)
