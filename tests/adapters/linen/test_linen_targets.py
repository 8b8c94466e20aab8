"""What `lorax.linen.apply_lora` finds in a model, and what it refuses."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

import lorax
import lorax.linen as ll
from lorax.adapters.linen.sites import SITES, LinenSite
from lorax.adapters.targets import TargetError
from lorax.layers.maps import Matmul, apply_map
from tests.adapters.linen.kinds import KINDS, One, Tied, moved

X = np.ones((2, 4, 6), np.float32)
IDS = np.arange(8, dtype=np.int32).reshape(2, 4)
KEY = jax.random.key(0)


def adapt(model, *x, variables=None, **settings):
    variables = model.init(KEY, *x) if variables is None else variables
    config = lorax.LoraConfig(**{"r": 1, "target_modules": ["layer"]} | settings)
    return ll.apply_lora(model, variables, config, *x, rngs=0)


class Own(nn.Dense):
    """A layer that has Dense's name and not its computation."""

    @nn.compact
    def __call__(self, inputs):
        return inputs @ self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features))


class Doubling(nn.Dense):
    """A layer that is Dense's with something around it."""

    @nn.compact
    def __call__(self, inputs):
        return super().__call__(2 * inputs)


def other_dot(*args, **kwargs):
    return jax.lax.dot_general(*args, **kwargs)


def other_promotion(*args, dtype, **kwargs):
    return args


def other_conv(*args, **kwargs):
    return jax.lax.conv_general_dilated(*args, **kwargs)


REFUSED = {
    "precision": (nn.Dense(5, precision="highest"), X, "it sets precision=highest"),
    "dot_general": (nn.Dense(5, dot_general=other_dot), X, "it has a dot_general of its own"),
    "dot_general_cls": (
        nn.DenseGeneral(5, dot_general_cls=lambda: other_dot),
        X,
        "it has a dot_general_cls of its own",
    ),
    "promote_dtype": (
        nn.Dense(5, promote_dtype=other_promotion),
        X,
        "it has a promote_dtype of its own",
    ),
    "batch_dims": (nn.DenseGeneral(5, batch_dims=(0,)), X, "it has batch_dims"),
    "elementwise": (
        nn.Einsum((6, 4), "btd,dt->btd", use_bias=False),
        X,
        "multiplies elementwise over an axis",
    ),
    "preferred": (
        nn.Einsum((6, 5), "btd,dh->bth", preferred_element_type=jnp.float32),
        X,
        "it sets preferred_element_type",
    ),
    "groups": (nn.Conv(4, (3,), feature_group_count=2), X, "it has feature_group_count=2"),
    "mask": (nn.Conv(4, (3,), mask=np.ones((3, 6, 4), np.float32)), X, "it has a mask"),
    "conv": (
        nn.Conv(4, (3,), conv_general_dilated=other_conv),
        X,
        "it has a conv_general_dilated of its own",
    ),
    "one_row": (nn.Embed(1, 4), 0 * IDS, "it has one row"),
    "promoting_embed": (
        nn.Embed(9, 4, promote_dtype=other_promotion),
        IDS,
        "it has a promote_dtype of its own",
    ),
    "own_call": (Own(5), X, "it has a method of its own that does not call that of nn.Dense"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_that_cannot_carry_an_adapter_is_refused_by_name(name):
    layer, x, reason = REFUSED[name]
    with pytest.raises(TargetError, match="layer cannot be adapted") as error:
        adapt(One(layer), x)
    assert reason in str(error.value)
    assert "lora.exclude_modules" in str(error.value)


class Normed(nn.Module):
    wrapper: type

    @nn.compact
    def __call__(self, x):
        arguments = {"update_stats": False} if self.wrapper is nn.SpectralNorm else {}
        return nn.Dense(4, name="other")(self.wrapper(nn.Dense(6, name="layer"))(x, **arguments))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(x.shape[-1], name="layer")(x), None


class Scanned(nn.Module):
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            Layer, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=6
        )
        return scan(name="layers")(x, None)[0]


def halved(variables):
    return jax.tree.map(lambda x: x / 2, variables)


class Mapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        mapped = nn.map_variables(nn.Dense, "params", halved, init=self.is_initializing())
        return mapped(6, name="layer")(x)


@pytest.mark.parametrize(
    "model", [Normed(nn.WeightNorm), Normed(nn.SpectralNorm), Mapped(), Scanned(axis=1)], ids=repr
)
def test_parameters_that_change_on_their_way_are_refused(model):
    """With six layers of 6 × 6, no shape tells on which axis they are stacked."""
    with pytest.raises(TargetError, match="layer cannot be adapted: its parameters"):
        adapt(model, X)


def test_a_subclass_that_calls_its_parent_is_adapted():
    model = One(Doubling(5))
    adapted, variables = adapt(model, X)
    variables = moved(variables)
    merged = ll.merge_lora(adapted, variables)
    np.testing.assert_allclose(model.apply(merged, X), adapted.apply(variables, X), rtol=1e-5)


class Two(nn.Module):
    """Encodes, and decodes what was encoded where it is asked to."""

    def setup(self):
        self.layer = nn.Dense(6)
        self.decoder = nn.Dense(5)
        self.norm = nn.LayerNorm()

    def __call__(self, x):
        return self.decoder(self.encode(x))

    def encode(self, x):
        return self.norm(self.layer(self.layer(x)))


def test_a_layer_that_is_called_twice_has_one_adapter_and_methods_work():
    model = Two()
    adapted, variables = adapt(model, X)
    assert list(variables["lora"]) == ["layer"]
    variables = moved(variables)
    merged = ll.merge_lora(adapted, variables)
    for method in (None, "encode", Two.encode):
        got = adapted.apply(variables, X, method=method)
        np.testing.assert_allclose(got, model.apply(merged, X, method=method), rtol=1e-5, atol=1e-5)


def test_layers_that_the_inputs_do_not_lead_to_are_named():
    model = Two()
    variables = model.init(KEY, X)
    config = lorax.LoraConfig(r=1)
    with pytest.raises(TargetError, match="decoder cannot be adapted: the example inputs do not"):
        ll.apply_lora(model, variables, config, X, rngs=0, method="encode")
    config = lorax.LoraConfig(r=1, exclude_modules=["decoder"])
    adapted, _ = ll.apply_lora(model, variables, config, X, rngs=0, method="encode")
    assert [layer.name for layer in adapted.layers] == ["layer"]


def test_all_linear_leaves_out_tables_convolutions_and_narrow_heads():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Conv(6, (2,))(nn.Embed(9, 6)(ids))
            return nn.Dense(2, name="head")(nn.Dense(6)(x))

    with pytest.warns(UserWarning, match="all-linear leaves out head"):
        adapted, _ = adapt(Model(), IDS, target_modules="all-linear", r=3)
    assert [layer.name for layer in adapted.layers] == ["Dense_0"]
    adapted, _ = adapt(Model(), IDS, target_modules=["Conv_0", "Embed_0"], r=3)
    assert {layer.name for layer in adapted.layers} == {"Conv_0", "Embed_0"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["layr"]}, "matches no linear module; did you mean layer"),
        ({"target_modules": ["norm"]}, "matches norm, which cannot carry an adapter"),
        ({"r": 6}, "decoder: rank must be in"),
        ({"modules_to_save": ["nrm"]}, "matches no module; did you mean norm"),
        ({"exclude_modules": ["layer", "decoder"]}, "leave no module to adapt"),
        ({"rank_pattern": {"norm": 2}}, "matches no target module"),
    ],
)
def test_settings_that_match_nothing_are_refused(settings, message):
    with pytest.raises(TargetError, match=message):
        adapt(Two(), X, **{"target_modules": ["layer", "decoder"]} | settings)


def test_methods_refuse_what_they_cannot_carry():
    with pytest.raises(TargetError, match=r"eva needs batches .* lorax\.linen\.initialize_eva"):
        adapt(KINDS["dense"].model(), X, init_lora_weights="eva")
    with pytest.raises(
        TargetError, match="layer cannot carry lora_bias: an embedding's update has no bias"
    ):
        adapt(KINDS["embed"].model(), IDS, lora_bias=True)
    with pytest.raises(TargetError, match="but no layer of a target module has a bias"):
        adapt(KINDS["dense_without_bias"].model(), X, bias="lora_only")


def test_the_arguments_are_checked():
    model = One(nn.Dense(5))
    plain = model.init(KEY, X)
    config = lorax.LoraConfig(r=1, target_modules=["layer"])
    apply = lambda *a, **k: ll.apply_lora(*a, X, **{"rngs": 0} | k)
    twin = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    for call, error, message in (
        (lambda: apply(twin, plain, config), TypeError, "call lorax.apply_lora"),
        (lambda: apply(model, plain, {"r": 1}), TypeError, r"write lorax.LoraConfig\(\*\*config\)"),
        (lambda: apply(model, plain["params"], config), TypeError, "must hold 'params'"),
        (lambda: apply(model, None, config), TypeError, "variables must be"),
        (lambda: apply(model, plain, config, rngs="0"), TypeError, "rngs must be"),
    ):
        with pytest.raises(error, match=message):
            call()
    adapted, variables = apply(model, plain, config)
    with pytest.raises(TargetError, match="have a collection 'lora' already"):
        apply(model, variables, config)
    with pytest.raises(TargetError, match="carries adapters already"):
        apply(adapted, plain, config)
    with pytest.raises(ValueError, match="must hold 'params' and 'lora'"):
        adapted.apply(plain, X)
    with pytest.raises(ValueError, match="has no lora_a of layer"):
        adapted.apply({**plain, "lora": {}}, X)
    stranger = {**variables["lora"], "head": {"kernel": jnp.ones(1)}}
    with pytest.raises(ValueError, match=r"has head\.kernel, which is no parameter of the model"):
        adapted.apply({**variables, "lora": stranger}, X)
    with pytest.raises(ValueError, match="are not mutable: name the collections that change"):
        adapted.apply(variables, X, mutable=True)
    with pytest.raises(ValueError, match="kernels must be auto, pallas or xla"):
        adapted.with_kernels("cuda")


def test_frozen_variables_shapes_as_inputs_and_boxes_are_taken():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    model = One(nn.Dense(5, kernel_init=init))
    plain = model.init(KEY, X)
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    config = lorax.LoraConfig(r=1, target_modules=["layer"], bias="all")
    adapted, variables = ll.apply_lora(model, freeze(plain), config, shape, rngs=KEY)
    np.testing.assert_array_equal(adapted.apply(variables, X), model.apply(plain, X))
    merged = ll.merge_lora(adapted, moved(variables))
    assert isinstance(merged["params"]["layer"]["kernel"], nn.Partitioned)


def test_einsums_of_a_call_are_followed_and_compared():
    layer = nn.Einsum((6, 5), use_bias=False)
    model = One(layer)
    adapted, variables = adapt(model, X, "btd,dh->bth")
    np.testing.assert_array_equal(
        adapted.apply(variables, X, "btd,dh->bth"), model.apply(variables, X, "btd,dh->bth")
    )
    turned = np.ones((2, 4, 5), np.float32)
    with pytest.raises(ValueError, match="layer is called with another einsum"):
        adapted.apply(variables, turned, "bth,dh->btd")


def test_tokens_of_an_embedding_train():
    model = Tied(nn.Embed(9, 6))
    body = nn.Sequential([model, nn.Dense(3)])
    config = {"target_modules": ["layers_1"], "trainable_token_indices": {"layer": [2, 5]}}
    adapted, variables = adapt(body, IDS, **config)
    variables = moved(variables)
    merged = ll.merge_lora(adapted, variables)
    before = body.init(KEY, IDS)["params"]["layers_0"]["layer"]["embedding"]
    after = merged["params"]["layers_0"]["layer"]["embedding"]
    changed = np.flatnonzero(np.abs(np.asarray(after - before)).max(-1))
    np.testing.assert_array_equal(changed, [2, 5])
    want = body.apply(merged, IDS)
    np.testing.assert_allclose(adapted.apply(variables, IDS), want, rtol=1e-5, atol=1e-5)


class Turned(nn.Module):
    """A layer of one's own, whose weight is (n, k)."""

    features: int

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal(1.0)
        return x @ self.param("weight", init, (self.features, x.shape[-1])).T


def turned(site, module, update, x):
    w = update.linear_map.matrix(site.weight_of(module))
    return apply_map(update.linear_map, x, w, update.operands(w), update.way, x.dtype)


def turned_map(module, shape):
    return Matmul((shape[1],), (shape[0],), order=(1, 0))


def test_a_kind_of_layer_is_one_entry_of_a_list(monkeypatch):
    model = One(Turned(5))
    with pytest.raises(TargetError, match="matches layer, which cannot carry an adapter"):
        adapt(model, X)
    site = LinenSite(Turned, {"__call__": turned}, turned_map, lambda _: None, weight="weight")
    monkeypatch.setattr("lorax.adapters.linen.sites.SITES", [*SITES, site])
    adapted, variables = adapt(model, X)
    plain = {"params": variables["params"]}
    np.testing.assert_allclose(adapted.apply(variables, X), model.apply(plain, X), rtol=1e-5)
    variables = moved(variables)
    merged = ll.merge_lora(adapted, variables)
    np.testing.assert_allclose(model.apply(merged, X), adapted.apply(variables, X), rtol=1e-5)
