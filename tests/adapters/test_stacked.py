"""Layers stacked by `nnx.vmap`: an adapter each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lorax
from lorax import LoraConfig, apply_lora, merge_lora
from tests.adapters.test_sites import floats, relative


class Stack(nnx.Module):
    """Layers stacked by `nnx.vmap` and run by `nnx.scan`."""

    def __init__(self, make, depth=3):
        @nnx.split_rngs(splits=depth)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return make(rngs)

        self.layers = stack(nnx.Rngs(5))
        self.depth = depth

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return x + jnp.tanh(layer(x))

        return run(x, self.layers)


@pytest.mark.parametrize(
    "make",
    [
        lambda rngs: nnx.Linear(8, 8, rngs=rngs),
        lambda rngs: nnx.Einsum("TD,HD->TH", (8, 8), (8,), rngs=rngs),
        lambda rngs: nnx.Conv(8, 8, (3,), rngs=rngs),
    ],
    ids=["linear", "einsum", "conv"],
)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_stacked_layers_have_an_adapter_each(make, settings, tmp_path):
    net = Stack(make)
    x = floats(6, 8)
    settings = {"r": 2, "target_modules": ["layers"], **settings}
    model = apply_lora(net, LoraConfig(**settings), rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(model(x), net(x))
    a = model.layers.adapter.params["lora_a"]
    assert a.shape[0] == 3 and not np.allclose(a[0], a[1])
    for index, name in enumerate(model.layers.adapter.spec.method.parameters):
        variable = model.layers.adapter.variable(name)
        noise = jax.random.normal(jax.random.key(index), variable.shape)
        variable.set_value(variable[...] + 0.3 * noise)
    got = model(x)
    assert np.abs(np.asarray(got - net(x))).max() > 0.1
    np.testing.assert_allclose(merge_lora(model)(x), got, rtol=1e-4, atol=1e-4)
    kept = lorax.unmerge_lora(merge_lora(model, keep_adapters=True))
    np.testing.assert_allclose(kept(x), got, rtol=1e-4, atol=1e-4)
    assert max(relative(other(x), got) for other in (merge_lora(model), kept)) <= 1e-5
    lorax.save_adapter(model, tmp_path / "out")
    np.testing.assert_array_equal(lorax.load_adapter(net, tmp_path / "out")(x), got)
    assert lorax.trainable_parameters(model).trained == sum(
        v.size for v in model.layers.adapter.params.values()
    )


def test_dropout_of_stacked_layers_differs_between_them():
    model = apply_lora(
        Stack(lambda rngs: nnx.Linear(8, 8, rngs=rngs)),
        LoraConfig(r=2, target_modules=["layers"], lora_dropout=0.5),
        rngs=nnx.Rngs(1),
    )
    lorax.set_dropout_key(model, jax.random.key(0))
    keys = jax.random.key_data(model.layers.adapter.dropout_key.get_value())
    assert keys.shape[0] == 3 and len({tuple(key) for key in np.asarray(keys).tolist()}) == 3
    b = model.layers.adapter.lora_b
    b.set_value(jnp.ones(b.shape))
    x = floats(6, 8)
    first = np.asarray(model(x))
    np.testing.assert_array_equal(model(x), first)
    lorax.set_dropout_key(model, jax.random.key(1))
    assert not np.allclose(model(x), first)


class Single(nnx.Module):
    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return self.layer(x)


def test_a_lora_bias_is_merged_in_the_order_of_the_outputs():
    layer = nnx.Einsum("btd,dnh->bhtn", (6, 2, 3), (3, 2), rngs=nnx.Rngs(0))
    config = LoraConfig(r=2, target_modules=["layer"], lora_bias=True)
    model = apply_lora(Single(layer), config, rngs=nnx.Rngs(1))
    model.layer.adapter.lora_bias.set_value(jnp.arange(6.0))
    x = floats(2, 4, 6)
    np.testing.assert_allclose(merge_lora(model)(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_table_of_one_row_is_refused_because_flax_gives_it_for_any_index():
    model = Single(nnx.Embed(1, 4, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="layer cannot be adapted: it has one row"):
        apply_lora(model, LoraConfig(r=1, target_modules=["layer"]), rngs=nnx.Rngs(1))
