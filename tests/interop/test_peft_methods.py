"""Every adapter method on every kind of layer against the installed PEFT: one net in both."""

import copy
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict

import lorax
from lorax.adapters.nnx.tree import adapted_layers, split_trainable
from lorax.adapters.targets import TargetError
from lorax.interop.peft import adapter_tensors, load_adapter, save_adapter
from tests.interop.peft_adapters import relative

# PEFT takes the bias of a B for a matrix that was cut.
pytestmark = pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape")

SITES = ["embed", "line", "biased", "plain", "image", "point"]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "rank_pattern": {"image": 3}},
    "dora": {"use_dora": True, "alpha_pattern": {"plain": 5}},
    "lora_bias": {"lora_bias": True},
    "pissa": {"init_lora_weights": "pissa"},
    "dora from olora": {"init_lora_weights": "olora", "use_dora": True},
    "tokens": {"trainable_token_indices": {"embed": [7, 3]}},
}
# An embedding's update has no bias, and what has none itself cannot take one in. PEFT begins linear
# layers alone with a part of the base.
LEFT_OUT = {
    "lora_bias": ("embed", "plain"),
    "pissa": ("embed", "line", "image", "point"),
    "dora from olora": ("embed", "line", "image", "point"),
    "tokens": ("embed",),
}
IDS = np.arange(32).reshape(4, 8) * 7 % 20
LABELS = np.array([0, 3, 1, 4])
STEPS = 20


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(20, 12)
        self.line = torch.nn.Conv1d(12, 16, 3, padding=1)
        self.biased = torch.nn.Linear(16, 24)
        self.plain = torch.nn.Linear(24, 16, bias=False)
        self.image = torch.nn.Conv2d(8, 6, 3, stride=2, padding=1)
        self.point = torch.nn.Conv2d(6, 4, 1)
        self.head = torch.nn.Linear(4, 5)

    def forward(self, ids):
        x = self.line(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        x = self.plain(torch.tanh(self.biased(x)))
        x = torch.tanh(self.image(x.reshape(-1, 8, 4, 4)))
        return self.head(self.point(x).mean((2, 3)))


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(20, 12, rngs=rngs)
        self.line = nnx.Conv(12, 16, (3,), padding=1, rngs=rngs)
        self.biased = nnx.Linear(16, 24, rngs=rngs)
        self.plain = nnx.Linear(24, 16, use_bias=False, rngs=rngs)
        self.image = nnx.Conv(8, 6, (3, 3), strides=2, padding=1, rngs=rngs)
        self.point = nnx.Conv(6, 4, (1, 1), rngs=rngs)
        self.head = nnx.Linear(4, 5, rngs=rngs)

    def __call__(self, ids):
        x = self.line(self.embed(ids))
        x = self.plain(jnp.tanh(self.biased(x)))
        x = x.reshape(-1, 8, 4, 4).transpose(0, 2, 3, 1)
        x = self.point(jnp.tanh(self.image(x)))
        return self.head(x.mean((1, 2)))


def weight_of(layer) -> np.ndarray:
    """Returns a layer's weight as torch holds it."""
    value = np.asarray(layer.embedding if isinstance(layer, nnx.Embed) else layer.kernel)
    return (
        value if isinstance(layer, nnx.Embed) else value.transpose(-1, -2, *range(value.ndim - 2))
    )


@pytest.fixture(scope="module")
def nets():
    """The net in torch, and the same in NNX."""
    torch.manual_seed(0)
    theirs, ours = TorchNet(), Net()
    for name, layer in theirs.named_children():
        weight: Any = layer.weight.detach().numpy()
        mine: Any = getattr(ours, name)
        if isinstance(mine, nnx.Embed):
            mine.embedding.set_value(jnp.asarray(weight))
            continue
        mine.kernel.set_value(jnp.asarray(weight.transpose(*range(2, weight.ndim), 1, 0)))
        if layer.bias is not None:
            mine.bias.set_value(jnp.asarray(layer.bias.detach().numpy()))
    np.testing.assert_allclose(ours(IDS), logits(theirs), atol=1e-6)
    return theirs, ours


def settings_of(method) -> dict[str, Any]:
    sites = [site for site in SITES if site not in LEFT_OUT.get(method, ())]
    return {"r": 2, "lora_alpha": 3, "target_modules": sites, **METHODS[method]}


def in_peft(net, method) -> Any:
    """Returns the net with adapters of PEFT, some way from where they start."""
    model = get_peft_model(copy.deepcopy(net), PeftLoraConfig(**settings_of(method)))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def logits(net) -> np.ndarray:
    with torch.no_grad():
        return net.eval()(torch.tensor(IDS)).numpy()


def torch_loss(model) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(torch.tensor(IDS)), torch.tensor(LABELS))


@pytest.fixture(scope="module", params=METHODS)
def case(request, nets, tmp_path_factory):
    """A method, its adapters in PEFT, and the same ones in NNX, loaded from PEFT's files."""
    model = in_peft(nets[0], request.param)
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    return request.param, model, load_adapter(nets[1], folder)


def in_file(model, method) -> dict[str, np.ndarray]:
    settings = settings_of(method)
    tables = settings.get("trainable_token_indices", ())
    assert len(adapted_layers(model)) == len(settings["target_modules"]) + len(tables)
    if "init_lora_weights" in settings:  # A and B alone, as PEFT trains them
        model = lorax.rebase_lora(model)
    return adapter_tensors(model)


def test_an_adapter_of_peft_computes_the_same_and_is_written_as_it_was(case):
    method, theirs, ours = case
    assert relative(ours(IDS), logits(theirs)) <= 1e-5
    stored = get_peft_model_state_dict(theirs)
    found = in_file(ours, method)
    assert found.keys() == stored.keys()
    for key, value in stored.items():
        np.testing.assert_array_equal(found[key], value.numpy())


def test_loss_and_gradients_and_a_training_are_those_of_peft(case, tmp_path):
    method, theirs, ours = case
    theirs = copy.deepcopy(theirs).train()
    ours = nnx.clone(ours)
    graph, trainable, rest = split_trainable(ours)

    @jax.jit
    def step(trainable, state):
        def loss_of(trainable):
            net: Any = nnx.merge(graph, trainable, rest)
            losses = optax.softmax_cross_entropy_with_integer_labels(net(IDS), LABELS)
            return losses.mean()

        loss, gradients = jax.value_and_grad(loss_of)(trainable)
        with jax.numpy_dtype_promotion("standard"):  # as optax needs it
            updates, state = optimizer.update(gradients, state, trainable)
        return loss, gradients, optax.apply_updates(trainable, updates), state

    optimizer = optax.adamw(1e-2, eps=1e-6, weight_decay=0.01)
    torch_optimizer = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=1e-2, eps=1e-6, weight_decay=0.01
    )
    state = optimizer.init(trainable)
    losses = []
    for index in range(STEPS):
        loss, gradients, trainable, state = step(trainable, state)
        torch_optimizer.zero_grad()
        expected = torch_loss(theirs)
        expected.backward()
        losses.append((float(loss), expected.item()))
        if index == 0:
            compare_gradients(nnx.merge(graph, gradients, rest), theirs, method)
        torch_optimizer.step()
    np.testing.assert_allclose(losses[0][0], losses[0][1], rtol=1e-4)
    assert max(abs(a - b) for a, b in losses) <= 1e-3
    assert losses[-1][0] < 0.95 * losses[0][0]


def compare_gradients(gradients, theirs, method):
    found = in_file(gradients, method)
    by_name = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    expected = get_peft_model_state_dict(theirs, state_dict=by_name)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert np.linalg.norm(value) > 0, key
        assert relative(found[key], value.numpy()) <= 1e-4, key


def test_what_is_exported_and_merged_is_what_peft_makes_of_it(nets, case, tmp_path):
    method, _, _ = case
    config = lorax.LoraConfig(**settings_of(method))
    ours = lorax.apply_lora(nets[1], config, rngs=nnx.Rngs(1))
    graph, trainable, rest = split_trainable(ours)
    keys = iter(jax.random.split(jax.random.key(2), 99))
    moved = jax.tree.map(lambda p: p + 0.2 * jax.random.normal(next(keys), p.shape), trainable)
    ours = nnx.merge(graph, moved, rest)
    save_adapter(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs: Any = PeftModel.from_pretrained(copy.deepcopy(nets[0]), tmp_path / "ours")
    assert relative(ours(IDS), logits(theirs)) <= 1e-5
    assert relative(ours(IDS), logits(nets[0])) > 1e-2
    merged = theirs.merge_and_unload()
    mine = lorax.merge_lora(ours)
    for name, layer in merged.named_children():
        same: Any = getattr(mine, name)
        assert relative(weight_of(same), layer.weight.detach().numpy()) <= 1e-6, name
        if getattr(layer, "bias", None) is not None:
            np.testing.assert_allclose(same.bias[...], layer.bias.detach().numpy(), atol=1e-6)
    assert relative(mine(IDS), logits(merged)) <= 1e-5


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_layers_that_are_trained_whole_are_those_of_peft(nets, bias, tmp_path):
    whole = ["line", "image", "head"]
    settings: dict[str, Any] = {"target_modules": ["plain", "point"], "modules_to_save": whole}
    model = get_peft_model(copy.deepcopy(nets[0]), PeftLoraConfig(r=2, bias=bias, **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter) * parameter.requires_grad
    model.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(nets[1], tmp_path / "theirs")
    assert relative(ours(IDS), logits(model)) <= 1e-5
    save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(copy.deepcopy(nets[0]), tmp_path / "ours")
    np.testing.assert_array_equal(logits(again), logits(model))


def refused_by_peft(net, **settings) -> None:
    with pytest.raises((ValueError, NotImplementedError)):
        get_peft_model(copy.deepcopy(net), PeftLoraConfig(r=2, **settings))


def test_a_bias_of_an_embedding_is_refused_as_by_peft(nets):
    settings: dict[str, Any] = {"lora_bias": True, "target_modules": ["embed", "biased"]}
    refused_by_peft(nets[0], **settings)
    with pytest.raises(TargetError, match="embed cannot carry lora_bias: an embedding's"):
        lorax.apply_lora(nets[1], lorax.LoraConfig(r=2, **settings), rngs=0)
    remedy = lorax.LoraConfig(r=2, exclude_modules=["embed"], **settings)
    assert list(adapted_layers(lorax.apply_lora(nets[1], remedy, rngs=0))) == ["biased"]


def test_dora_with_a_bias_is_refused_as_by_peft(nets):
    settings: dict[str, Any] = {
        "lora_bias": True,
        "use_dora": True,
        "target_modules": ["biased"],
    }
    refused_by_peft(nets[0], **settings)
    with pytest.raises(ValueError, match=r"lora_bias.*use_dora"):
        lorax.LoraConfig(**settings)


def test_a_bias_that_no_layer_takes_in_is_neither_merged_here_nor_by_peft(nets, tmp_path):
    settings: dict[str, Any] = {"lora_bias": True, "target_modules": ["plain"]}
    ours = lorax.apply_lora(nets[1], lorax.LoraConfig(r=2, **settings), rngs=0)
    with pytest.raises(ValueError, match=r"plain: its lora_bias cannot be merged"):
        lorax.merge_lora(ours)
    with pytest.warns(UserWarning, match="merging LoRA weights won't be possible"):
        model: Any = get_peft_model(copy.deepcopy(nets[0]), PeftLoraConfig(r=2, **settings))
    with pytest.raises(RuntimeError, match="Impossible to merge"):
        model.merge_and_unload()


@pytest.mark.parametrize("method", ["dora", "lora_bias"])
def test_what_plain_lora_does_not_hold_is_no_portable_export(nets, method, tmp_path):
    ours = lorax.apply_lora(nets[1], lorax.LoraConfig(**settings_of(method)), rngs=0)
    with pytest.raises(ValueError, match=r"peft-portable holds A and B only, but .*export peft or"):
        save_adapter(ours, tmp_path / "out", format="peft-portable")
    assert not (tmp_path / "out").exists()
    save_adapter(ours, tmp_path / "out")  # the remedy
