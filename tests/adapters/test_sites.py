"""The contract of sites: which layers carry an adapter, and one kind that a single object adds."""

import jax
import numpy as np
import pytest
from flax import nnx

from lorax import LoraConfig, apply_lora, merge_lora, unload_lora
from lorax.adapters.method import Shape
from lorax.adapters.nnx.tree import adapted_layers
from lorax.adapters.sites import SITES, LinearSite, Obstacle, Site, find_site
from lorax.layers.linear import Linear


class Product(nnx.Module):
    """``x·W`` under names of its own."""

    def __init__(self, inputs, outputs, rngs):
        self.matrix = nnx.Param(jax.random.normal(rngs.params(), (inputs, outputs)))

    def __call__(self, x):
        return x @ self.matrix[...]


class ProductSite:
    """The layers above; those with one output carry no adapter."""

    def find(self, module):
        if not isinstance(module, Product):
            return None
        shape = Shape(*module.matrix.shape)
        return shape if shape.outputs > 1 else Obstacle("it has one output")

    def adopt(self, module):
        layer = Linear(*module.matrix.shape, use_bias=False, rngs=nnx.Rngs(0))
        layer.kernel = module.matrix
        return layer


class Squared(nnx.Linear):
    """A linear layer with something of its own in its call."""

    def __call__(self, inputs, out_sharding=None):
        return super().__call__(inputs) ** 2


def is_variable(value):
    return isinstance(value, nnx.Variable)


RNGS = nnx.Rngs(3)
# A site, two of its modules that carry an adapter, and one that does not, with the reason.
EXAMPLES = {
    LinearSite: (
        lambda: [nnx.Linear(24, 16, rngs=RNGS), Linear(8, 8, use_bias=False, rngs=RNGS)],
        lambda: Squared(8, 8, rngs=RNGS),
        "__call__ of its own",
    ),
    ProductSite: (
        lambda: [Product(24, 16, RNGS), Product(8, 8, RNGS)],
        lambda: Product(8, 1, RNGS),
        "one output",
    ),
}


@pytest.fixture(params=[*SITES, ProductSite()], ids=lambda site: type(site).__name__)
def site(request, monkeypatch) -> Site:
    """A site of the list; a new one is in it by its one entry, and has examples above."""
    if request.param not in SITES:
        monkeypatch.setattr("lorax.adapters.sites.SITES", [*SITES, request.param])
    return request.param


def test_a_site_knows_its_modules_and_no_others(site):
    carrying, odd, reason = EXAMPLES[type(site)]
    for module in carrying():
        known = find_site(module)
        assert known is not None and known == (site, site.find(module))
        values = [v.get_value() for v in jax.tree.leaves(nnx.state(module), is_leaf=is_variable)]
        assert site.find(module) in [value.shape for value in values]
    found = site.find(odd())
    assert isinstance(found, Obstacle) and reason in found.reason
    assert site.find(nnx.LayerNorm(8, rngs=RNGS)) is None
    for other, (modules, _, _) in EXAMPLES.items():
        assert other is type(site) or not any(site.find(module) for module in modules())


def test_what_is_adopted_computes_the_same_from_the_same_arrays(site):
    for module in EXAMPLES[type(site)][0]():
        layer = site.adopt(module)
        shape = site.find(module)
        assert isinstance(layer, Linear)
        assert (layer.in_features, layer.out_features) == shape
        x = jax.random.normal(jax.random.key(0), (3, shape.inputs))
        np.testing.assert_array_equal(layer(x), module(x))
        held = lambda m: {id(v.get_value()) for _, v in nnx.iter_graph(m) if is_variable(v)}
        assert held(layer) == held(module)
        known = find_site(layer)
        assert known is not None and known[0].adopt(layer) is layer  # which is one already


def test_adapted_merged_and_unloaded_they_are_what_a_model_has(site):
    first, _ = EXAMPLES[type(site)][0]()
    net = nnx.Sequential(first, nnx.Linear(16, 8, rngs=RNGS))
    x = jax.random.normal(jax.random.key(1), (5, 24))
    model = apply_lora(net, LoraConfig(r=2), rngs=nnx.Rngs(1))
    assert len(adapted_layers(model)) == 2
    np.testing.assert_array_equal(model(x), net(x))
    for layer in adapted_layers(model).values():
        b = layer.adapter.lora_b
        b.set_value(jax.random.normal(jax.random.key(2), b.shape))
    assert np.abs(np.asarray(model(x) - net(x))).max() > 0.1
    np.testing.assert_allclose(merge_lora(model)(x), model(x), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(unload_lora(model)(x), net(x))


def test_one_that_cannot_carry_an_adapter_is_refused_by_name(site):
    _, odd, reason = EXAMPLES[type(site)]
    net = nnx.Sequential(odd(), nnx.Linear(8, 8, rngs=RNGS))
    with pytest.raises(ValueError, match=f"layers.0 cannot be adapted: .*{reason}"):
        apply_lora(net, LoraConfig(r=1), rngs=nnx.Rngs(1))
