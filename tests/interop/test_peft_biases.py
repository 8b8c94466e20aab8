"""PEFT's `bias="all"` with `modules_to_save`: it saves the biases of such modules three times."""

import copy
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file

import lorax
import lorax.linen as ll
from lorax.interop.peft_config import AdapterError

pytestmark = pytest.mark.filterwarnings("ignore")

X = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)


class TorchBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 6), torch.nn.Linear(6, 8)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.block, self.head = torch.nn.Linear(8, 8), TorchBlock(), TorchBlock()

    def forward(self, x):
        return self.head(self.block(torch.tanh(self.first(x))))


class NnxBlock(nnx.Module):
    def __init__(self):
        self.up, self.down = nnx.Linear(8, 6, rngs=nnx.Rngs(0)), nnx.Linear(6, 8, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


class NnxNet(nnx.Module):
    def __init__(self):
        self.first = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        self.block, self.head = NnxBlock(), NnxBlock()

    def __call__(self, x):
        return self.head(self.block(jnp.tanh(self.first(x))))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="down")(jnp.tanh(nn.Dense(6, name="up")(x)))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(8, name="first")(x))
        return LinenBlock(name="head")(LinenBlock(name="block")(x))


def params_of(net):
    params: dict[str, Any] = {}
    for name, layer in net.named_modules():
        if isinstance(layer, torch.nn.Linear):
            values = params
            for part in name.split("."):
                values = values.setdefault(part, {})
            values["kernel"] = jnp.asarray(layer.weight.detach().numpy().T)
            values["bias"] = jnp.asarray(layer.bias.detach().numpy())
    return params


def nnx_of(net):
    model = NnxNet()
    nnx.update(model, nnx.State(params_of(net)))
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An adapter that PEFT trained and saved: the folder, and what it computes."""
    config = LoraConfig(
        r=2, target_modules=["first"], bias="all", modules_to_save=["head", "block.down"]
    )
    model = get_peft_model(TorchNet(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
        expected = model(torch.tensor(X)).numpy()
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    keys = load_file(folder / "adapter_model.safetensors").keys()
    for name in (
        "head.modules_to_save.default.up",
        "block.down.modules_to_save",
        "head.original_module.down",
    ):
        assert f"base_model.model.{name}.bias" in keys
    return folder, expected


def in_peft(folder):
    model: Any = PeftModel.from_pretrained(copy.deepcopy(TorchNet()), folder)
    with torch.no_grad():
        return model(torch.tensor(X)).numpy()


def test_nnx_computes_what_peft_does_and_peft_reads_it_again(trained, tmp_path):
    model = lorax.load_adapter(nnx_of(TorchNet()), trained[0])
    np.testing.assert_allclose(model(X), trained[1], atol=1e-6)
    lorax.save_adapter(model, tmp_path / "ours")
    np.testing.assert_allclose(in_peft(tmp_path / "ours"), trained[1], atol=1e-6)


def test_linen_computes_what_peft_does_and_peft_reads_it_again(trained, tmp_path):
    base = {"params": params_of(TorchNet())}
    adapted, variables = ll.load_adapter(LinenNet(), base, trained[0], X)
    np.testing.assert_allclose(adapted.apply(variables, X), trained[1], atol=1e-6)
    ll.save_adapter(adapted, variables, tmp_path / "ours")
    np.testing.assert_allclose(in_peft(tmp_path / "ours"), trained[1], atol=1e-6)


def test_one_bias_of_two_values_is_refused(trained, tmp_path):
    tensors = load_file(trained[0] / "adapter_model.safetensors")
    config = (trained[0] / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config)
    copied = "base_model.model.head.modules_to_save.default.up.bias"
    save_file({**tensors, copied: tensors[copied] + 1}, tmp_path / "adapter_model.safetensors")
    said = r"head\.modules_to_save\.default\.up\.bias differs from .*head\.up\.bias"
    with pytest.raises(AdapterError, match=said):
        lorax.load_adapter(nnx_of(TorchNet()), tmp_path)
    with pytest.raises(AdapterError, match=said):
        ll.load_adapter(LinenNet(), {"params": params_of(TorchNet())}, tmp_path, X)
    spoiled = {**tensors, copied.replace("up", "other"): tensors[copied]}
    save_file(spoiled, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"has unexpected 1 tensors, .*other\.bias"):
        lorax.load_adapter(nnx_of(TorchNet()), tmp_path)
