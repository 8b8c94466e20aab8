"""Starts of adapters on a model: what does not change, what is subtracted, how it is saved."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lorax
from lorax import LoraConfig, apply_lora, merge_lora, unload_lora
from lorax.adapters.nnx.tree import adapted_layers

STARTS = ["gaussian", "orthogonal", "pissa", "pissa_niter_3", "olora"]
SPLIT = ["pissa", "pissa_niter_3", "olora"]


class Net(nnx.Module):
    def __init__(self, dtype=jnp.float32):
        rngs = nnx.Rngs(0)
        options = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.embed = nnx.Embed(12, 16, **options)
        self.fc = nnx.Linear(16, 24, **options)
        self.conv = nnx.Conv(24, 16, (3,), **options)
        self.out = nnx.LinearGeneral(16, (4, 6), **options)

    def __call__(self, ids):
        return self.out(self.conv(jnp.tanh(self.fc(self.embed(ids)))))


IDS = jax.random.randint(jax.random.key(1), (2, 7), 0, 12)


def adapt(start, dtype=jnp.float32, **settings):
    targets = ["embed", "fc", "conv", "out"]
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, init_lora_weights=start, **settings
    )
    return apply_lora(Net(dtype), config, rngs=nnx.Rngs(1))


def change(model):
    for index, layer in enumerate(adapted_layers(model).values()):
        for name in layer.adapter.params:
            variable = layer.adapter.variable(name)
            noise = 0.2 * jax.random.normal(jax.random.key(index), variable.shape)
            variable.set_value(variable[...] + noise)
    return model


def relative(found, expected):
    found, expected = np.float64(found), np.float64(expected)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("start", STARTS)
def test_a_new_adapter_changes_nothing(start, dora):
    model = adapt(start, use_dora=dora)
    expected = Net()(IDS)
    if start == "gaussian":
        np.testing.assert_array_equal(model(IDS), expected)
    assert relative(model(IDS), expected) <= 1e-6
    wide = adapt(start, jnp.bfloat16, use_dora=dora)(IDS)
    # What is subtracted is what is added, both rounded alike: bfloat16 shows no more than sums do.
    assert relative(wide, Net(jnp.bfloat16)(IDS)) <= 2**-7
    if start in SPLIT:
        a = model.fc.adapter.params["lora_a"]
        assert np.abs(np.asarray(a @ model.fc.adapter.params["lora_b"])).max() > 0.01


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("start", STARTS)
def test_merged_saved_rebased_and_unloaded(start, dora, tmp_path):
    model = change(adapt(start, use_dora=dora))
    got = model(IDS)
    assert relative(got, Net()(IDS)) > 0.05
    assert relative(merge_lora(model)(IDS), got) <= 1e-5
    np.testing.assert_array_equal(unload_lora(model)(IDS), Net()(IDS))
    lorax.save_adapter(model, tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["r"] == (8 if start in SPLIT else 4)
    again = lorax.load_adapter(Net(), tmp_path / "plain")
    np.testing.assert_array_equal(again(IDS), got)
    if start not in SPLIT:
        with pytest.raises(ValueError, match="no adapter began with a part of the base"):
            lorax.rebase_lora(model)
        return
    rebased = lorax.rebase_lora(model)
    assert relative(rebased(IDS), got) <= 1e-5
    base = unload_lora(rebased)
    assert relative(base(IDS), Net()(IDS)) > 0.05
    lorax.save_adapter(rebased, tmp_path / "rebased")
    assert json.loads((tmp_path / "rebased" / "adapter_config.json").read_text())["r"] == 4
    assert relative(lorax.load_adapter(base, tmp_path / "rebased")(IDS), got) <= 1e-5


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_the_scale_survives_the_doubled_rank(rslora, tmp_path):
    model = change(adapt("pissa", use_rslora=rslora))
    lorax.save_adapter(model, tmp_path / "out")
    again = lorax.load_adapter(Net(), tmp_path / "out")
    assert again.fc.adapter.spec.scale == pytest.approx(model.fc.adapter.spec.scale, rel=1e-12)
    assert relative(again(IDS), model(IDS)) <= 1e-6


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"init_lora_weights": "orthogonal", "r": 3},
            r"fc cannot carry lora: r=3 is odd.*take r=4",
        ),
        ({"init_lora_weights": "pissa", "r": 17}, r"fc: rank must be in \[1, 16\]"),
    ],
    ids=str,
)
def test_a_start_that_a_layer_cannot_have_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        apply_lora(Net(), LoraConfig(target_modules=["fc"], **settings), rngs=nnx.Rngs(1))


@pytest.mark.parametrize("start", [False, 1, "loftq", "pissa_niter_", "kaiming"])
def test_other_words_are_refused_with_those_that_are_known(start):
    with pytest.raises(ValueError, match=r"needs true, gaussian, orthogonal, pissa, .*olora"):
        LoraConfig(init_lora_weights=start)
