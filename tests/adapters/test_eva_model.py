"""`initialize_eva` on models: what PEFT comes to, and what it refuses."""

import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights

import lorax
from lorax.adapters import search
from lorax.adapters.nnx.directions import Collector
from lorax.adapters.nnx.eva import apply_ranks, ranks_of
from lorax.adapters.nnx.recorder import carriers_of
from lorax.adapters.nnx.tree import adapted_layers, named_modules
from lorax.adapters.targets import TargetError
from lorax.config.explain import ConfigError
from lorax.layers.carrier import Frozen
from tests.adapters.test_eva import NAMES, PLAIN, Net, batches
from tests.bounds import distance

pytestmark = pytest.mark.filterwarnings("ignore")

CLOSE = 2e-3
"""As in `test_eva`: rounding, over the distance of singular values."""


class Twin(nnx.Module):
    """`Net` of flax."""

    def __init__(self, net):
        rngs = nnx.Rngs(0)
        for name in NAMES:
            theirs = net.get_submodule(name)
            layer = nnx.Linear(theirs.in_features, theirs.out_features, rngs=rngs)
            layer.kernel.set_value(jnp.asarray(theirs.weight.detach().numpy().T))
            layer.bias.set_value(jnp.asarray(theirs.bias.detach().numpy()))  # pyright: ignore
            setattr(self, name, layer)

    def __call__(self, x):
        inner = jnp.tanh(self.a(x)) + 0.1 * self.b(x)  # pyright: ignore
        return self.out(jax.nn.relu(self.middle(inner)))  # pyright: ignore


@pytest.fixture(scope="module")
def data():
    # The second time, nothing moves any more, and both end.
    return 2 * [batches(1, rows=64, k=24, factor=0.75)[0]]


def run(model, x):
    return model(x)


def begin(model, data, names=NAMES, forward=run, mask=None, **settings):
    settings = {"r": 4, "target_modules": list(names)} | settings
    config = lorax.LoraConfig(init_lora_weights="eva", **settings)
    return lorax.initialize_eva(model, config, data, forward, mask=mask, rngs=0)


def begin_theirs(data, eva_config, names=NAMES, **settings) -> Any:
    config = LoraConfig(
        target_modules=list(names), init_lora_weights="eva", eva_config=eva_config, **settings
    )
    model = get_peft_model(Net(), config)
    initialize_lora_eva_weights(model, list(map(torch.tensor, data)), **PLAIN)
    return model


@pytest.fixture(scope="module")
def begun(data):
    return begin(Twin(Net()), data)


@pytest.mark.parametrize(
    ("names", "r", "settings"),
    [
        (NAMES, 4, {}),
        (["a", "middle", "out"], 4, {"rho": 3.0}),
        (["a", "middle", "out"], 3, {"rho": 1.5, "whiten": True}),
        (["a", "middle", "out"], 4, {"adjust_scaling_factors": False}),
    ],
)
def test_a_model_begins_as_with_peft(data, names, r, settings):
    theirs = begin_theirs(data, EvaConfig(**settings), names, r=r, lora_alpha=6).base_model.model
    ours = begin(Twin(Net()), data, names, r=r, lora_alpha=6.0, eva_config=settings)
    layers = adapted_layers(ours)
    found = {name: theirs.get_submodule(name) for name in layers}
    ranks = {name: layer.r["default"] for name, layer in found.items()}
    assert sum(ranks_of(ours).values()) == r * len(names)
    assert len({*ranks.values()}) > 1
    # Which of two layers with one input gets the larger rank is PEFT's sorting's chance.
    assert sorted(ranks_of(ours).get(n, 0) for n in "ab") == sorted(ranks.get(n, 0) for n in "ab")
    for name, layer in found.items():
        spec = layers[name].adapter.spec
        if name not in "ab" or "b" not in names:
            assert spec.r == ranks[name]
            assert spec.lora_alpha == pytest.approx(layer.lora_alpha["default"])
            assert spec.scale == pytest.approx(layer.scaling["default"])
        shared = min(spec.r, ranks[name])
        a = layer.lora_A["default"].weight.detach().numpy().T
        assert distance(layers[name].adapter.params["lora_a"][:, :shared], a[:, :shared]) <= CLOSE
        assert not np.any(layers[name].adapter.params["lora_b"])


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_a_new_adapter_changes_nothing_and_leaves_the_model_alone(data, settings):
    model = Twin(Net())
    expected = model(data[0])
    names = ["middle", "out"]
    ours = begin(model, data, names, **settings)
    np.testing.assert_array_equal(ours(data[0]), expected)
    assert sorted(adapted_layers(ours)) == names
    assert [type(module) for module in named_modules(model).values()] == 4 * [nnx.Linear]
    trained = begin(model, data, names)
    assert type(trained.middle) is type(lorax.apply_lora(model, lorax.LoraConfig(), rngs=0).middle)  # pyright: ignore


class Apart(nnx.Module):
    """Two layers that read inputs of their own."""

    def __init__(self):
        self.a, self.b = (nnx.Linear(24, 8, rngs=nnx.Rngs(seed)) for seed in range(2))

    def __call__(self, x):
        return self.a(x[0]) + self.b(x[1])


def test_a_layer_without_a_rank_is_frozen_and_plain(tmp_path):
    x = np.random.default_rng(0).normal(size=(2, 64, 24)).astype(np.float32)
    x[0, :, 2:] *= 0.01  # two directions explain all, and elsewhere each explains a little
    ours = begin(Apart(), 2 * [x], "ab", r=1)
    assert ranks_of(ours) == {"a": 2}
    assert isinstance(ours.b.kernel, Frozen) and not ranks_of(ours).get("b")
    np.testing.assert_array_equal(ours(x), Apart()(x))
    lorax.save_adapter(ours, tmp_path / "adapter")
    assert ranks_of(lorax.load_adapter(Apart(), tmp_path / "adapter")) == {"a": 2}


def test_it_survives_its_files_here_and_in_peft(begun, data, tmp_path):
    for index, layer in enumerate(adapted_layers(begun).values()):
        b = layer.adapter.variable("lora_b")
        b.set_value(0.3 * jax.random.normal(jax.random.key(index), b.shape))
    lorax.save_adapter(begun, tmp_path / "adapter")
    again = lorax.load_adapter(Twin(Net()), tmp_path / "adapter")
    assert ranks_of(again) == ranks_of(begun) and len({*ranks_of(begun).values()}) > 1
    np.testing.assert_array_equal(again(data[0]), begun(data[0]))
    theirs: Any = PeftModel.from_pretrained(Net(), str(tmp_path / "adapter"))  # pyright: ignore
    with torch.no_grad():
        assert distance(begun(data[0]), theirs(torch.tensor(data[0])).numpy()) <= 1e-5


def test_an_adapter_that_peft_began_and_saved_is_read(data, tmp_path):
    begin_theirs(data, EvaConfig(), r=4).save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["eva_config"]
    ours = lorax.load_adapter(Twin(Net()), tmp_path / "adapter")
    assert sum(ranks_of(ours).values()) == 16 and len({*ranks_of(ours).values()}) > 1


def test_the_loop_ends_where_peft_s_does():
    """The layers converge after four, two and three batches, and no longer change then."""
    rows = list(batches(8, rows=64, k=24, factor=0.75))
    names = ["a", "middle", "out"]
    theirs = begin_theirs(rows, EvaConfig(tau=0.9895), names, r=3).base_model.model
    ours = begin(Twin(Net()), rows, names, r=3, eva_config={"tau": 0.9895})
    for name, layer in adapted_layers(ours).items():
        a = theirs.get_submodule(name).lora_A["default"].weight.detach().numpy().T
        assert distance(layer.adapter.params["lora_a"], a) <= 1e-2, name  # a batch fewer: 0.04


def test_a_layer_that_has_converged_changes_no_more(data):
    model = nnx.clone(Twin(Net()))
    layers = carriers_of(model, ["a", "out"])
    collector = Collector(model, layers, {"a": 4, "out": 4}, run, None, 0.9)
    collector.run(data[0])
    before = {name: collector.directions(name) for name in layers}
    collector.go_on_with(["out"])
    found = collector.run(2 * data[0] + 1)
    assert found["a"].seen == 64 and found["out"].seen == 128
    for got, want in zip(collector.directions("a"), before["a"], strict=True):
        np.testing.assert_array_equal(got, want)


def test_the_ranks_alone_make_the_same_adapters(begun):
    config = lorax.LoraConfig(r=4, target_modules=list(NAMES), init_lora_weights="eva")
    again = apply_ranks(Twin(Net()), config, ranks_of(begun), rngs=nnx.Rngs(0))
    assert ranks_of(again) == ranks_of(begun)
    for name, layer in adapted_layers(again).items():
        assert layer.adapter.spec == adapted_layers(begun)[name].adapter.spec


def test_an_iterator_s_batches_come_again(data):
    ours = begin(Twin(Net()), iter(data[:1]))
    assert ranks_of(ours) == ranks_of(begin(Twin(Net()), data))


def test_only_rows_of_the_mask_count(data):
    random = np.random.default_rng(3)
    mask = random.random(64) < 0.7
    spoiled = np.where(mask[:, None], data[0], 9 * random.normal(size=(64, 24)))
    given = [{"x": spoiled.astype(np.float32), "mask": mask}] * 2
    ours = begin(Twin(Net()), given, forward=lambda m, b: m(b["x"]), mask=lambda b: b["mask"])
    expected = begin(Twin(Net()), [data[0][mask]] * 2)
    assert ranks_of(ours) == ranks_of(expected)
    for name, layer in adapted_layers(ours).items():
        a = adapted_layers(expected)[name].adapter.params["lora_a"]
        assert distance(layer.adapter.params["lora_a"], a) <= CLOSE


SCALES = (0.5 ** np.arange(24, dtype=np.float32)).reshape(1, 1, 24)


class Scaled(nnx.Linear):
    """A subclass of the user's: the kernel multiplies another input than it is called with."""

    def __call__(self, x):  # pyright: ignore
        return super().__call__(x * SCALES)


class Many(nnx.Module):
    """Layers of other kinds than `nnx.Linear`."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(16, 24, rngs=rngs)
        self.own = Scaled(24, 24, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 24, decode=False, rngs=rngs)
        self.einsum = nnx.Einsum("btd,dhe->bthe", (24, 3, 8), rngs=rngs)
        self.conv = nnx.Conv(24, 8, (3,), rngs=rngs)
        self.unused = nnx.Linear(24, 8, rngs=rngs)
        make = nnx.vmap(lambda rngs: nnx.Linear(24, 24, rngs=rngs))
        self.stack = make(nnx.Rngs(0).fork(split=2))

    def __call__(self, ids):
        x = self.own(self.embed(ids))
        x = x + self.attention(x)
        x, _ = nnx.scan(lambda x, layer: (layer(x), None))(x, self.stack)
        return self.conv(self.einsum(x).reshape(x.shape))


@pytest.fixture(scope="module")
def many():
    return Many()


IDS = np.random.default_rng(0).integers(0, 16, (4, 12)).astype(np.int32)


def test_layers_of_other_kinds_begin_too(many):
    names = ["embed", "own", "query", "key", "value", "einsum", "attention.out"]
    ours = begin(many, [IDS] * 2, names, r=2)
    np.testing.assert_array_equal(ours(IDS), many(IDS))
    layers = adapted_layers(ours)
    assert layers["embed"].adapter.spec.r == 2  # as ever
    assert sum(ranks_of(ours).values()) == 2 * len(names)
    # A's columns span what the kernel multiplies, whatever the layer is called with.
    x = np.asarray(many.embed(IDS)).reshape(-1, 24) * SCALES[0]
    _, _, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
    a = np.asarray(layers["own"].adapter.params["lora_a"])
    assert distance(np.abs(np.sum(a.T * vt[: a.shape[1]], axis=1)), np.ones(a.shape[1])) <= CLOSE


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["conv", "own"], r"conv is a convolution, and EVA is for linear .*exclude_modules"),
        (["stack", "own"], r"stack is a stack of layers, and EVA gives each .*exclude_modules"),
        (["unused", "own"], r"forward does not call unused, .*exclude_modules"),
        (["embed"], r"EVA is for linear layers, and lora.target_modules names embeddings alone"),
    ],
)
def test_layers_that_cannot_take_part_are_named(many, names, said):
    with pytest.raises(TargetError, match=said):
        begin(many, [IDS], names, r=2)


def test_settings_of_eva_go_with_eva():
    settings: dict[str, Any] = {"init_lora_weights": "EVA", "eva_config": {"rho": 1.5}}
    config = lorax.LoraConfig(**settings)
    assert config.init_lora_weights == "eva" and config.eva.rho == 1.5 and config.eva.tau == 0.99
    theirs = EvaConfig()
    plain = lorax.LoraConfig(init_lora_weights="eva").eva.model_dump()
    assert plain == {name: getattr(theirs, name) for name in plain}
    with pytest.raises(ConfigError, match=r"eva_config: is only read with init_lora_weights: eva"):
        lorax.LoraConfig(eva_config={})  # pyright: ignore
    for name, value in (("rho", 0.5), ("tau", 1.5), ("label_mask_value", 0)):
        with pytest.raises(ConfigError, match=rf"eva_config\.{name}"):
            lorax.LoraConfig(**settings | {"eva_config": {name: value}})


def test_without_batches_there_is_no_eva(data):
    config = lorax.LoraConfig(init_lora_weights="eva", target_modules=["a"])
    with pytest.raises(TargetError, match=r"call lorax\.initialize_eva\(model, config, batches, "):
        lorax.apply_lora(Twin(Net()), config, rngs=0)
    with pytest.raises(ValueError, match="batches is empty: EVA needs at least one"):
        begin(Twin(Net()), [])
    with pytest.raises(ValueError, match="needs init_lora_weights='eva', got True: set it, or "):
        lorax.initialize_eva(Twin(Net()), lorax.LoraConfig(), data, run, rngs=0)
    with pytest.raises(TypeError, match=r"needs forward for a Twin, such as forward=lambda model"):
        begin(Twin(Net()), data, forward=None)
    with pytest.raises(TargetError, match="carries adapters already; merge_lora or unload_lora it"):
        begin(begin(Twin(Net()), data), data)


def test_a_mask_of_another_shape_is_refused(data):
    with pytest.raises(ValueError, match=r"a: the mask is \(3,\), and .* \(64,\) rows of 24"):
        begin(Twin(Net()), data, mask=lambda batch: jnp.ones(3, bool))


def test_inputs_without_variance_are_refused_after_one_pass(data, monkeypatch):
    same = np.ones((64, 24), np.float32)
    with pytest.raises(ValueError, match=r"a: EVA found no variance in its inputs"):
        begin(Twin(Net()), [same])
    assert ranks_of(begin(Twin(Net()), [same, *data, *data]))  # as long as others come
    monkeypatch.setattr(search, "MOST_BATCHES", 3)
    with pytest.raises(ValueError, match=r"a: EVA found no variance in its inputs"):
        begin(Twin(Net()), itertools.repeat(same))


def test_directions_that_keep_turning_are_an_error(data, monkeypatch):
    monkeypatch.setattr(search, "MOST_BATCHES", 3)
    random = np.random.default_rng(0)
    noise = (random.normal(size=(64, 24)).astype(np.float32) for _ in range(9))
    with pytest.raises(ValueError, match=r"not converged after 3 batches: lower lora.eva_config"):
        begin(Twin(Net()), noise, eva_config={"tau": 1.0})


class Checkpointed(Twin):
    """Its layers run where changes of variables are lost."""

    def __call__(self, x):
        graph, state = nnx.split(self)
        call = lambda state, x: Twin.__call__(nnx.merge(graph, state), x)
        return jax.checkpoint(call)(state, x)


def test_inputs_that_do_not_arrive_are_an_error(data):
    with pytest.raises(ValueError, match=r"inputs of a do not arrive: .* use that of flax.nnx"):
        begin(Checkpointed(Net()), data)
