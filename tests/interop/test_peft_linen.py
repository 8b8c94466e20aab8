"""Adapters of a Linen model against the installed PEFT: one net in Linen and in torch."""

import copy
import json
import warnings
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.numpy import load_file

import lorax
import lorax.linen as ll
from tests.adapters.linen.kinds import moved
from tests.interop.peft_adapters import relative
from tests.interop.test_peft_methods import IDS, METHODS, TorchNet, in_peft, logits, settings_of

# PEFT takes the bias of a B for a matrix that was cut.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape")


class Net(nn.Module):
    """`TorchNet` in Linen."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(20, 12, name="embed")(ids)
        x = nn.Conv(16, (3,), padding=1, name="line")(x)
        x = jnp.tanh(nn.Dense(24, name="biased")(x))
        x = nn.Dense(16, use_bias=False, name="plain")(x)
        x = x.reshape(-1, 8, 4, 4).transpose(0, 2, 3, 1)
        x = jnp.tanh(nn.Conv(6, (3, 3), strides=2, padding=1, name="image")(x))
        x = nn.Conv(4, (1, 1), name="point")(x)
        return nn.Dense(5, name="head")(x.mean((1, 2)))


def params_of(net):
    """Returns the variables of `Net` with the weights of a net in torch."""
    params: dict[str, Any] = {}
    for name, layer in net.named_children():
        weight = layer.weight.detach().numpy()
        params[name] = {"embedding": jnp.asarray(weight)}
        if not isinstance(layer, torch.nn.Embedding):
            kernel = weight.transpose(*range(2, weight.ndim), 1, 0)
            params[name] = {"kernel": jnp.asarray(kernel)}
            if layer.bias is not None:
                params[name]["bias"] = jnp.asarray(layer.bias.detach().numpy())
    return {"params": params}


@pytest.fixture(scope="module")
def nets():
    torch.manual_seed(0)
    theirs = TorchNet()
    variables = params_of(theirs)
    np.testing.assert_allclose(Net().apply(variables, IDS), logits(theirs), atol=1e-6)
    return theirs, variables


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_peft_computes_the_same_and_is_written_as_it_was(method, nets, tmp_path):
    theirs = in_peft(nets[0], method)
    theirs.save_pretrained(tmp_path / "theirs")
    adapted, variables = ll.load_adapter(Net(), nets[1], tmp_path / "theirs", IDS)
    assert relative(adapted.apply(variables, IDS), logits(theirs)) <= 1e-5
    ll.save_adapter(adapted, variables, tmp_path / "ours")
    found = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    stored = get_peft_model_state_dict(theirs)
    assert found.keys() == stored.keys()
    for key, value in stored.items():
        wanted = value.numpy()
        if "init_lora_weights" in METHODS[method] and "magnitude" not in key:
            rows = wanted.shape[0] if "lora_A" in key else None  # what is subtracted comes after
            columns = wanted.shape[1] if "lora_B" in key else None
            assert found[key].size == 2 * wanted.size
            np.testing.assert_array_equal(found[key][:rows, :columns], wanted)
            continue
        np.testing.assert_array_equal(found[key], wanted)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_and_merged_is_what_peft_makes_of_it(method, nets, tmp_path):
    bias = "lora_only" if method == "lora" else "none"
    settings = {**settings_of(method), "modules_to_save": ["head"], "bias": bias}
    config = lorax.LoraConfig(**settings)
    adapted, variables = ll.apply_lora(Net(), nets[1], config, IDS, rngs=1)
    variables = moved(variables, 0.2)
    folder = ll.save_adapter(adapted, variables, tmp_path / "ours")
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["auto_mapping"] == {"base_model_class": "Net", "parent_library": __name__}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs: Any = PeftModel.from_pretrained(copy.deepcopy(nets[0]), folder)
    ours = adapted.apply(variables, IDS)
    assert relative(ours, logits(theirs)) <= 1e-5
    assert relative(ours, logits(nets[0])) > 1e-2
    merged = ll.merge_lora(adapted, variables)
    assert relative(Net().apply(merged, IDS), logits(theirs.merge_and_unload())) <= 1e-5
