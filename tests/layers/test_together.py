"""Biases of layers that run together: frozen ones in the operation, trained ones outside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lorax
import lorax.layers.together as together
from lorax.adapters.nnx.tree import adapted_layers
from lorax.layers.linear import Linear
from lorax.layers.together import apply_together


class Net(nnx.Module):
    """q, k and v, of which v has no bias."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        normal = nnx.initializers.normal(1.0)
        self.q = Linear(16, 24, bias_init=normal, rngs=rngs)
        self.k = Linear(16, 8, bias_init=normal, rngs=rngs)
        self.v = Linear(16, 8, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return apply_together((self.q, self.k, self.v), x)


X = jax.random.normal(jax.random.key(1), (2, 5, 16))


@pytest.mark.parametrize("settings", [{}, {"bias": "all"}, {"use_dora": True}], ids=str)
def test_biased_layers_together_are_each_alone(settings, monkeypatch):
    given = []
    group = together.lora_linear_group

    def record(x, members, **options):
        given.extend(member.bias is not None for member in members)
        return group(x, members, **options)

    monkeypatch.setattr(together, "lora_linear_group", record)
    model = lorax.apply_lora(Net(), lorax.LoraConfig(r=2, **settings), rngs=1)
    for layer in adapted_layers(model).values():
        layer.adapter.lora_b.set_value(
            jax.random.normal(jax.random.key(2), layer.adapter.lora_b.shape)
        )
    for y, layer in zip(model(X), (model.q, model.k, model.v), strict=True):
        np.testing.assert_allclose(y, layer(X), rtol=1e-5, atol=1e-5)
    frozen = settings != {"bias": "all"}
    assert given == [frozen, frozen, False]
    for y, base in zip(Net()(X), lorax.unload_lora(model)(X), strict=True):
        np.testing.assert_array_equal(y, base)


def test_a_bias_that_trains_has_its_gradient():
    model = lorax.apply_lora(Net(), lorax.LoraConfig(r=2, bias="all"), rngs=1)
    graph, trains, rest = nnx.split(model, nnx.Param, ...)

    def loss(trains):
        return sum(jnp.sum(y**2) for y in nnx.merge(graph, trains, rest)(X))

    gradient = jax.grad(loss)(trains)
    outputs = model(X)
    np.testing.assert_allclose(gradient["q"]["bias"][...], 2 * outputs[0].sum((0, 1)), rtol=1e-4)
    np.testing.assert_allclose(gradient["k"]["bias"][...], 2 * outputs[1].sum((0, 1)), rtol=1e-4)
