"""The contract of sites: which layers carry an adapter, and one kind that a single object adds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lorax
from lorax import LoraConfig, apply_lora, merge_lora, unload_lora
from lorax.adapters.method import Shape
from lorax.adapters.nnx.tree import adapted_layers
from lorax.adapters.sites import SITES, Obstacle, Site, find_site
from lorax.layers.carrier import Carrier
from lorax.layers.linear import Linear


class Product(nnx.Module):
    """``x·W`` under names of its own."""

    def __init__(self, inputs, outputs, rngs):
        self.matrix = nnx.Param(jax.random.normal(rngs.params(), (inputs, outputs)))

    def __call__(self, x):
        return x @ self.matrix[...]


class ProductSite:
    """The layers above; those with one output carry no adapter."""

    by_name_only = False

    def find(self, module):
        if not isinstance(module, Product):
            return None
        shape = Shape(*module.matrix.shape)
        return shape if shape.outputs > 1 else Obstacle("it has one output")

    def adopt(self, module):
        layer = Linear(*module.matrix.shape, use_bias=False, rngs=nnx.Rngs(0))
        layer.kernel = module.matrix
        return layer


class Doubled(nnx.Linear):
    """A linear layer whose call adds something of its own to Flax's."""

    factor = 2

    def __call__(self, inputs, out_sharding=None):
        return self.factor * super().__call__(inputs)

    def own(self):
        return self.factor


class Apart(nnx.Linear):
    """A linear layer whose call does not use Flax's."""

    def __call__(self, inputs, out_sharding=None):
        return jnp.dot(inputs, self.kernel[...]) ** 2


class Normed(nnx.Linear):
    """A linear layer whose call reads its kernel besides, which merging would change."""

    def __call__(self, inputs, out_sharding=None):
        return super().__call__(inputs) / jnp.linalg.norm(self.kernel[...])


class Whitened(nnx.Embed):
    def __call__(self, inputs, out_sharding=None):
        return self.embedding[...][inputs] / 2


RNGS = nnx.Rngs(3)
VOCABULARY = 40


def floats(*shape):
    return jax.random.normal(jax.random.key(0), shape)


IDS = jax.random.randint(jax.random.key(0), (3, 5), 0, VOCABULARY)


def conv(window, **options):
    return nnx.Conv(6, 8, window, rngs=RNGS, **options)


# Kinds of layers: those that carry an adapter, each with an input, and some that do not, with the
# reason. The first has 24 inputs and 16 outputs, or is an embedding.
EXAMPLES = {
    "Linear": (
        lambda: [
            (nnx.Linear(24, 16, rngs=RNGS), floats(3, 24)),
            (Linear(8, 8, use_bias=False, rngs=RNGS), floats(3, 8)),
            (Doubled(8, 4, rngs=RNGS), floats(2, 3, 8)),
        ],
        lambda: [
            (Apart(8, 8, rngs=RNGS), "__call__ of its own that does not call that of nnx.Linear"),
            (Normed(8, 8, rngs=RNGS), "__call__ of its own that reads its kernel"),
            (nnx.Linear(8, 8, precision="highest", rngs=RNGS), "it sets precision=highest"),
            (nnx.Linear(8, 8, dot_general=jax.lax.dot, rngs=RNGS), "dot_general or promote_dtype"),
        ],
    ),
    "LinearGeneral": (
        lambda: [
            (nnx.LinearGeneral(24, 16, rngs=RNGS), floats(3, 24)),
            (nnx.LinearGeneral(24, (4, 4), rngs=RNGS), floats(3, 2, 24)),
            (nnx.LinearGeneral((4, 6), 16, axis=(-2, -1), rngs=RNGS), floats(3, 2, 4, 6)),
            (nnx.LinearGeneral((6, 4), (2, 8), axis=(3, 1), rngs=RNGS), floats(3, 6, 2, 4)),
            (nnx.LinearGeneral(24, 16, axis=1, use_bias=False, rngs=RNGS), floats(3, 24, 2)),
        ],
        lambda: [
            (nnx.LinearGeneral(8, 8, batch_axis={0: 3}, rngs=RNGS), "it has a batch_axis"),
            (nnx.LinearGeneral(8, 8, dot_general_cls=lambda: 0, rngs=RNGS), "a dot_general of its"),
        ],
    ),
    "Einsum": (
        lambda: [
            (nnx.Einsum("TD,DH->TH", (24, 16), (16,), rngs=RNGS), floats(3, 24)),
            (nnx.Einsum("BTD,NDH->BTNH", (2, 24, 8), (2, 8), rngs=RNGS), floats(3, 2, 24)),
            (nnx.Einsum("BTD,DNH->BNTH", (24, 2, 8), rngs=RNGS), floats(3, 5, 24)),
            (nnx.Einsum("BTNH,NHD->BTD", (4, 6, 16), (16,), rngs=RNGS), floats(3, 2, 4, 6)),
            (nnx.Einsum("...D,HD->...H", (16, 24), (16,), rngs=RNGS), floats(3, 2, 24)),
            (nnx.Einsum("D...,DH->...H", (24, 16), rngs=RNGS), floats(24, 2, 3)),
            (nnx.Einsum("BTNH,HND->BDT", (6, 4, 16), rngs=RNGS), floats(3, 2, 4, 6)),
        ],
        lambda: [
            (nnx.Einsum("BTD,BDH->BTH", (3, 8, 8), rngs=RNGS), "elementwise over an axis of both"),
            (nnx.Einsum("BTD,DH->TBH", (8, 8), rngs=RNGS), "changes or drops axes of its input"),
            (nnx.Einsum("BTD,DH->BT", (8, 8), rngs=RNGS), "no matrix product of input and kernel"),
        ],
    ),
    "Embed": (
        lambda: [
            (nnx.Embed(VOCABULARY, 16, rngs=RNGS), IDS),
            (nnx.Embed(VOCABULARY, 8, dtype=jnp.bfloat16, rngs=RNGS), IDS[0]),
        ],
        lambda: [(Whitened(8, 8, rngs=RNGS), "does not call that of nnx.Embed")],
    ),
    "Conv": (
        lambda: [
            (nnx.Conv(24, 16, (1,), rngs=RNGS), floats(3, 4, 24)),
            (conv((3, 3), strides=2), floats(2, 9, 9, 6)),
            (conv((3, 3), padding="CIRCULAR", use_bias=False), floats(2, 5, 5, 6)),
            (conv((3,), padding="CAUSAL", kernel_dilation=2), floats(2, 3, 7, 6)),
            (conv((4, 4), strides=4, padding="VALID"), floats(8, 8, 6)),
        ],
        lambda: [
            (conv((3,), feature_group_count=2), "it has feature_group_count=2"),
            (conv((3,), mask=jnp.ones((3, 6, 8))), "it has a mask"),
        ],
    ),
    "ProductSite": (
        lambda: [(Product(24, 16, RNGS), floats(3, 24)), (Product(8, 8, RNGS), floats(3, 8))],
        lambda: [(Product(8, 1, RNGS), "it has one output")],
    ),
}


def name_of(site):
    return site.kind.__name__ if hasattr(site, "kind") else type(site).__name__


@pytest.fixture(params=[*SITES, ProductSite()], ids=name_of)
def site(request, monkeypatch) -> Site:
    """A site of the list; a new one is in it by its one entry, and has examples above."""
    if request.param not in SITES:
        monkeypatch.setattr("lorax.adapters.sites.SITES", [*SITES, request.param])
    return request.param


def is_variable(value):
    return isinstance(value, nnx.Variable)


def arrays_of(module):
    return {id(v.get_value()) for _, v in nnx.iter_graph(module) if is_variable(v)}


class Holder(nnx.Module):
    """One layer, and another one that takes an adapter too."""

    def __init__(self, layer):
        self.layer = layer
        self.other = nnx.Linear(4, 4, rngs=RNGS)

    def __call__(self, x):
        return self.layer(x)


def relative(found, expected):
    """Returns the L2 distance, relative."""
    expected = np.float64(expected)
    return np.linalg.norm(np.float64(found) - expected) / np.linalg.norm(expected)


def adapt(net, r=2, **settings):
    """Returns a net whose adapters are some way from where they start."""
    targets = {"target_modules": ["layer", "other"]}
    model = apply_lora(net, LoraConfig(r=r, **targets, **settings), rngs=nnx.Rngs(1))
    for layer in adapted_layers(model).values():
        for index, name in enumerate(layer.adapter.spec.method.parameters):
            variable = layer.adapter.variable(name)
            noise = 0.3 * jax.random.normal(jax.random.key(index), variable.shape)
            variable.set_value(variable[...] + noise)
    return model


def test_a_site_knows_its_modules_and_no_others(site):
    carrying, odd = EXAMPLES[name_of(site)]
    for module, _ in carrying():
        known = find_site(module)
        assert known is not None and known == (site, site.find(module))
        sizes = [
            v.get_value().size for v in jax.tree.leaves(nnx.state(module), is_leaf=is_variable)
        ]
        shape = site.find(module)
        assert isinstance(shape, Shape) and shape.inputs * shape.outputs in sizes
    for module, reason in odd():
        found = site.find(module)
        assert isinstance(found, Obstacle) and reason in found.reason
    assert site.find(nnx.LayerNorm(8, rngs=RNGS)) is None
    for other, (modules, _) in EXAMPLES.items():
        assert other == name_of(site) or not any(site.find(module) for module, _ in modules())


def test_what_is_adopted_computes_the_same_from_the_same_arrays(site):
    for module, x in EXAMPLES[name_of(site)][0]():
        expected = module(x)
        shape = site.find(module)
        held = arrays_of(module)
        layer = site.adopt(module)
        assert isinstance(layer, Carrier)
        assert layer.linear_map.shape == shape
        np.testing.assert_array_equal(layer(x), expected)
        assert arrays_of(layer) == held
        known = find_site(layer)
        assert known is not None and known[0].adopt(layer) is layer  # which is one already


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_adapted_merged_and_unloaded_they_are_what_a_model_has(site, settings, tmp_path):
    if settings.get("lora_bias") and name_of(site) == "Embed":
        pytest.skip("an embedding's update has no bias, and is refused")
    for index, (module, x) in enumerate(EXAMPLES[name_of(site)][0]()):
        net = Holder(module)
        fresh = apply_lora(
            net, LoraConfig(r=2, target_modules=["layer"], **settings), rngs=nnx.Rngs(1)
        )
        np.testing.assert_array_equal(fresh(x), net(x))
        model = adapt(net, **settings)
        got = model(x)
        assert got.shape == net(x).shape and got.dtype == net(x).dtype
        tolerance = 0.05 if got.dtype == jnp.bfloat16 else 1e-4
        assert np.abs(np.asarray(got - net(x), np.float32)).max() > tolerance
        np.testing.assert_array_equal(unload_lora(model)(x), net(x))
        lorax.save_adapter(model, tmp_path / f"{index}")
        again = lorax.load_adapter(net, tmp_path / f"{index}")
        np.testing.assert_array_equal(again(x), got)
        if settings.get("lora_bias") and getattr(module, "bias", None) is None:
            continue
        back = lorax.unmerge_lora(merge_lora(model, keep_adapters=True))
        for other in (merge_lora(model), back):
            np.testing.assert_allclose(
                np.float32(other(x)), np.float32(got), rtol=tolerance, atol=tolerance
            )
            if got.dtype == jnp.float32:
                assert relative(other(x), got) <= 1e-5


def test_one_that_cannot_carry_an_adapter_is_refused_by_name(site):
    for odd, reason in EXAMPLES[name_of(site)][1]():
        with pytest.raises(ValueError, match=f"layer cannot be adapted: .*{reason}"):
            adapt(Holder(odd), r=1)


def test_without_adapters_everything_trains_again():
    net = Holder(nnx.Linear(8, 8, rngs=RNGS))
    net.more = nnx.Embed(4, 8, rngs=RNGS)
    net.tied = nnx.Embed(4, 8, rngs=RNGS)
    net.tied.embedding = net.more.embedding
    paths = lambda model: {path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    for plain in (merge_lora(adapt(net)), unload_lora(adapt(net))):
        assert paths(plain) == paths(net) and plain.tied.embedding is plain.more.embedding


def test_a_subclass_stays_one():
    net = Holder(Doubled(8, 8, rngs=RNGS))
    layer = adapt(net).layer
    assert isinstance(layer, Doubled) and layer.own() == 2 and type(layer).__name__ == "Doubled"
    assert type(net.layer) is Doubled


def test_a_tied_head_reads_the_adapted_table():
    net = Holder(nnx.Embed(VOCABULARY, 16, rngs=RNGS))
    query = floats(3, 16)
    for settings in ({}, {"use_dora": True}):
        model = adapt(net, **settings)
        merged = merge_lora(model).layer.attend(query)
        assert np.abs(np.asarray(merged - net.layer.attend(query))).max() > 0.1
        np.testing.assert_allclose(model.layer.attend(query), merged, rtol=1e-4, atol=1e-4)


def test_all_linear_takes_attention_and_leaves_out_embeddings_and_convolutions():
    class Attending(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(16, 16, rngs=rngs)
            self.conv = nnx.Conv(16, 16, (3,), rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)

        def __call__(self, ids):
            return self.attention(self.conv(self.embed(ids)))

    net = Attending(nnx.Rngs(0))
    ids = jnp.arange(12).reshape(2, 6)
    model = apply_lora(net, LoraConfig(r=2), rngs=nnx.Rngs(1))
    parts = ("key", "out", "query", "value")
    assert set(adapted_layers(model)) == {f"attention.{part}" for part in parts}
    np.testing.assert_array_equal(model(ids), net(ids))
    for layer in adapted_layers(model).values():
        layer.adapter.lora_b.set_value(0.3 * floats(*layer.adapter.lora_b.shape))
    assert np.abs(np.asarray(model(ids) - net(ids))).max() > 0.1
    np.testing.assert_allclose(merge_lora(model)(ids), model(ids), rtol=1e-4, atol=1e-4)
    named = LoraConfig(r=2, target_modules=["embed", "conv"])
    assert set(adapted_layers(apply_lora(net, named, rngs=nnx.Rngs(1)))) == {"embed", "conv"}
