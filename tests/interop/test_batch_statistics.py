"""Batch statistics are in no adapter's file: the warning names them, and its remedy works."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lorax
import lorax.linen as ll

X = np.random.default_rng(0).normal(1.0, 2.0, (16, 6)).astype(np.float32)
CONFIG = lorax.LoraConfig(r=2, target_modules=["first"])


class NnxNet(nnx.Module):
    def __init__(self):
        self.first = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0))
        self.shift = nnx.BatchStat(jnp.zeros((1, 4)))

    def __call__(self, x):
        return self.norm(self.first(x)) + self.shift[...]


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(4, name="first")(x))


def test_nnx(tmp_path):
    model = lorax.apply_lora(NnxNet(), CONFIG, rngs=0)
    model.norm.mean.set_value(jnp.arange(4.0))
    with pytest.warns(UserWarning, match=r"norm, the model: batch stat.*nnx\.BatchStat") as told:
        lorax.save_adapter(model, tmp_path / "adapter")
    assert told[0].filename == __file__
    loaded = lorax.load_adapter(NnxNet(), tmp_path / "adapter")
    assert not np.array_equal(loaded(X), model(X))
    nnx.update(loaded, nnx.state(model, nnx.BatchStat))
    np.testing.assert_array_equal(loaded(X), model(X))


def test_linen(tmp_path):
    base = LinenNet().init(jax.random.key(0), X)
    adapted, variables = ll.apply_lora(LinenNet(), base, CONFIG, X, rngs=0)
    _, changed = adapted.apply(variables, X, train=True, mutable=["batch_stats"])
    variables |= changed
    with pytest.warns(UserWarning, match=r"batch_stats of the variables are not saved") as told:
        ll.save_adapter(adapted, variables, tmp_path / "adapter")
    assert told[0].filename == __file__
    again, loaded = ll.load_adapter(LinenNet(), base, tmp_path / "adapter", X)
    wanted = adapted.apply(variables, X)
    assert not np.array_equal(again.apply(loaded, X), wanted)
    again, loaded = ll.load_adapter(LinenNet(), {**base, **changed}, tmp_path / "adapter", X)
    np.testing.assert_array_equal(again.apply(loaded, X), wanted)
