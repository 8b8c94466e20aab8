"""EVA on Linen models: what PEFT and the NNX front come to, and what it refuses."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft import EvaConfig

import lorax
import lorax.linen as ll
from lorax.adapters.nnx.eva import ranks_of as nnx_ranks_of
from lorax.adapters.nnx.tree import adapted_layers
from lorax.adapters.targets import TargetError
from tests.adapters import test_eva_model as on_nnx
from tests.adapters.linen.kinds import KINDS, moved
from tests.adapters.test_eva import NAMES, Net, batches
from tests.adapters.test_eva_model import CLOSE, SCALES, begin_theirs, run
from tests.bounds import distance

pytestmark = pytest.mark.filterwarnings("ignore")


class Twin(nn.Module):
    """`Net` of Linen."""

    def setup(self):
        self.a, self.b = nn.Dense(20), nn.Dense(20)
        self.middle, self.out = nn.Dense(28), nn.Dense(4)

    def inner(self, x):
        return jnp.tanh(self.a(x)) + 0.1 * self.b(x)

    def outer(self, x):
        return self.out(nn.relu(self.middle(x)))

    def __call__(self, x):
        return self.outer(self.inner(x))


def variables_of(net):
    """Returns the variables of `Twin` with the weights of a net in torch."""
    layers = {name: net.get_submodule(name) for name in NAMES}
    return {
        "params": {
            name: {
                "kernel": jnp.asarray(layer.weight.detach().numpy().T),
                "bias": jnp.asarray(layer.bias.detach().numpy()),
            }
            for name, layer in layers.items()
        }
    }


@pytest.fixture(scope="module")
def data():
    # The second time, nothing moves any more, and both end.
    return 2 * [batches(1, rows=64, k=24, factor=0.75)[0]]


@pytest.fixture(scope="module")
def variables():
    return variables_of(Net())


def begin(model, variables, data, names=NAMES, forward=run, mask=None, **settings):
    settings = {"r": 4, "target_modules": list(names)} | settings
    config = lorax.LoraConfig(init_lora_weights="eva", **settings)
    return ll.initialize_eva(model, variables, config, data, forward, mask=mask, rngs=0)


def ranks_of(adapted):
    return {layer.name: layer.spec.r for layer in adapted.layers}


def values_of(begun):
    adapted, variables = begun
    return {layer.name: layer.params(variables) for layer in adapted.layers}


@pytest.fixture(scope="module")
def begun(variables, data):
    return begin(Twin(), variables, data)


@pytest.mark.parametrize(
    ("names", "r", "settings"),
    [
        (NAMES, 4, {}),
        (["a", "middle", "out"], 3, {"rho": 1.5, "whiten": True}),
        (["a", "middle", "out"], 4, {"adjust_scaling_factors": False}),
    ],
)
def test_a_model_begins_as_with_peft_and_as_in_nnx(variables, data, names, r, settings):
    begun = begin(Twin(), variables, data, names, r=r, lora_alpha=6.0, eva_config=settings)
    twin = on_nnx.Twin(Net())
    in_nnx = on_nnx.begin(twin, data, names, r=r, lora_alpha=6.0, eva_config=settings)
    theirs = begin_theirs(data, EvaConfig(**settings), names, r=r, lora_alpha=6).base_model.model
    assert len({*ranks_of(begun[0]).values()}) > 1
    assert ranks_of(begun[0]) == nnx_ranks_of(in_nnx)
    for layer in begun[0].layers:
        ours = layer.params(begun[1])
        expected = adapted_layers(in_nnx)[layer.name].adapter
        assert layer.spec == expected.spec
        assert distance(ours["lora_a"], expected.params["lora_a"]) <= CLOSE
        assert not np.any(ours["lora_b"])
        peft = theirs.get_submodule(layer.name)
        if layer.name not in "ab" or "b" not in names:  # of which PEFT's sorting decides
            assert layer.spec.r == peft.r["default"]
            assert layer.spec.scale == pytest.approx(peft.scaling["default"])
        shared = min(layer.spec.r, peft.r["default"])
        a = peft.lora_A["default"].weight.detach().numpy().T
        assert distance(ours["lora_a"][:, :shared], a[:, :shared]) <= CLOSE


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"bias": "lora_only"}])
def test_a_new_adapter_changes_nothing_and_leaves_the_base_alone(variables, data, settings):
    adapted, begun = begin(Twin(), variables, data, ["middle", "out"], **settings)
    assert sorted(begun) == sorted({"params", "lora"} | {"lora_fixed"} & begun.keys())
    expected = Twin().apply(variables, data[0])
    got = adapted.apply(begun, data[0])
    assert distance(got, expected) <= (1e-6 if "use_dora" in settings else 0)
    for name, layer in variables["params"].items():
        assert begun["params"][name]["kernel"] is layer["kernel"]
    config = lorax.LoraConfig(r=4, target_modules=["middle", "out"], **settings)
    plain = ll.apply_lora(Twin(), variables, config, data[0], rngs=0)[1]
    assert jax.tree.structure(begun) == jax.tree.structure(plain)


def test_the_ranks_survive_their_files(begun, variables, data, tmp_path):
    adapted = begun[0]
    trained = moved(begun[1])
    ll.save_adapter(adapted, trained, tmp_path / "adapter")
    again, loaded = ll.load_adapter(Twin(), variables, tmp_path / "adapter", data[0])
    assert ranks_of(again) == ranks_of(adapted) and len({*ranks_of(adapted).values()}) > 1
    np.testing.assert_array_equal(again.apply(loaded, data[0]), adapted.apply(trained, data[0]))
    in_nnx = lorax.load_adapter(on_nnx.Twin(Net()), tmp_path / "adapter")
    assert nnx_ranks_of(in_nnx) == ranks_of(adapted)


class Apart(nn.Module):
    """Two layers that read inputs of their own."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="a")(x[0]) + nn.Dense(8, name="b")(x[1])


def test_a_layer_without_a_rank_carries_nothing(tmp_path):
    x = np.random.default_rng(0).normal(size=(2, 64, 24)).astype(np.float32)
    x[0, :, 2:] *= 0.01  # two directions explain all, and elsewhere each explains a little
    variables = Apart().init(jax.random.key(0), x)
    adapted, begun = begin(Apart(), variables, 2 * [x], "ab", r=1)
    assert ranks_of(adapted) == {"a": 2} and list(begun["lora"]) == ["a"]
    ll.save_adapter(adapted, begun, tmp_path / "adapter")
    again, _ = ll.load_adapter(Apart(), variables, tmp_path / "adapter", x)
    assert ranks_of(again) == {"a": 2}


@pytest.mark.parametrize("kind", ["heads", "two_axes", "einsum"])
def test_layers_of_other_kinds_begin_as_in_nnx(kind):
    kind = KINDS[kind]
    x = jax.random.normal(jax.random.key(1), (16, 4, 6))
    variables = kind.model().init(jax.random.key(0), x)
    _, begun = begin(kind.model(), variables, 2 * [x], ["layer"], r=2)
    in_nnx = on_nnx.begin(kind.in_nnx(variables["params"]), 2 * [x], ["layer"], r=2)
    a = adapted_layers(in_nnx)["layer"].adapter.params["lora_a"]
    assert distance(begun["lora"]["layer"]["lora_a"], a) <= CLOSE


class Scaled(nn.Dense):
    """A subclass of the user's: the kernel multiplies another input than it is called with."""

    @nn.compact
    def __call__(self, inputs):
        return super().__call__(inputs * SCALES)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.MultiHeadDotProductAttention(2, name="attention")(x)
        return x + nn.Dense(24, name="down")(jnp.tanh(nn.Dense(8, name="up")(x + y)))


class Many(nn.Module):
    """Blocks within a transform, and layers of other kinds."""

    wrap: Any = lambda block: block

    @nn.compact
    def __call__(self, ids, both: bool = True):
        x = Scaled(24, name="own")(nn.Embed(16, 24, name="embed")(ids))
        block = self.wrap(Block)  # one class: nn.jit traces its modules once, where it can
        for index in range(2):
            x = block(name=f"block_{index}")(x)
        stack = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = stack(name="stack")(x, None)
        x = nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3,), name="conv")(x))
        return x if both and not self.is_initializing() else nn.Dense(8, name="unused")(x)


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(24, name="dense")(x), None


IDS = np.random.default_rng(0).integers(0, 16, (4, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def many():
    return Many().init(jax.random.key(0), IDS)


TARGETS = ["embed", "own", "query", "key", "value", "attention.out", "up", "down"]


@pytest.fixture(scope="module")
def plain(many):
    return begin(Many(), many, 2 * [IDS], TARGETS, r=2)


def test_what_the_kernel_multiplies_counts(many, plain):
    adapted, variables = plain
    assert ranks_of(adapted)["embed"] == 2  # as ever
    assert sum(ranks_of(adapted).values()) == 2 * 14
    x = np.asarray(many["params"]["embed"]["embedding"])[IDS].reshape(-1, 24) * SCALES[0]
    _, _, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
    a = np.asarray(variables["lora"]["own"]["lora_a"])
    assert distance(np.abs(np.sum(a.T * vt[: a.shape[1]], axis=1)), np.ones(a.shape[1])) <= CLOSE


@pytest.mark.parametrize("wrap", [nn.remat, nn.jit], ids=["remat", "jit"])
def test_transforms_of_linen_carry_what_is_recorded(many, plain, wrap):
    for _ in range(2):  # of which the second finds what JAX kept
        begun = begin(Many(wrap), many, 2 * [IDS], TARGETS, r=2)
        assert ranks_of(begun[0]) == ranks_of(plain[0])
        for name, values in values_of(begun).items():
            wanted = values_of(plain)[name]["lora_a"]
            np.testing.assert_allclose(values["lora_a"], wanted, rtol=0, atol=CLOSE)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["conv", "own"], r"conv is a convolution, and EVA is for linear .*exclude_modules"),
        (["dense", "own"], r"stack.dense is a stack of layers, and EVA .*exclude_modules"),
        (["unused", "own"], r"unused cannot be adapted: .* do not lead to it.* forward"),
        (["embed"], r"EVA is for linear layers, and lora.target_modules names embeddings alone"),
    ],
)
def test_layers_that_cannot_take_part_are_named(many, names, said):
    with pytest.raises(TargetError, match=said):
        begin(Many(), many, [IDS], names, r=2)


def test_forward_calls_methods_several_times(variables, data, begun):
    def forward(model, x):
        rest, changed = model(x, method="inner", mutable=["batch_stats"])
        assert not changed
        return model(rest, method=Twin.outer)

    again = begin(Twin(), variables, data, forward=forward)
    assert ranks_of(again[0]) == ranks_of(begun[0])
    for name, values in values_of(again).items():
        assert distance(values["lora_a"], values_of(begun)[name]["lora_a"]) <= CLOSE


def test_all_calls_of_a_layer_count(variables, data):
    parts = [{"left": x[:20], "right": x[20:]} for x in data]
    twice = lambda model, b: (model(b["left"]), model(b["right"]))
    # The second rows end the search, whether they are of a second batch or of the first.
    at_once = {"names": ["a"], "eva_config": {"tau": 0.0}}
    ours = begin(Twin(), variables, parts, forward=twice, **at_once)
    wanted = begin(Twin(), variables, [data[0][:20], data[0][20:]], **at_once)
    a = (each[1]["lora"]["a"]["lora_a"] for each in (ours, wanted))
    assert distance(*a) <= CLOSE


def test_only_rows_of_the_mask_count(variables, data):
    random = np.random.default_rng(3)
    mask = random.random(64) < 0.7
    spoiled = np.where(mask[:, None], data[0], 9 * random.normal(size=(64, 24)))
    given = [{"x": spoiled.astype(np.float32), "mask": mask}] * 2
    forward = lambda model, batch: model(batch["x"])
    ours = begin(Twin(), variables, given, forward=forward, mask=lambda batch: batch["mask"])
    expected = begin(Twin(), variables, [data[0][mask]] * 2)
    assert ranks_of(ours[0]) == ranks_of(expected[0])
    for name, values in values_of(ours).items():
        assert distance(values["lora_a"], values_of(expected)[name]["lora_a"]) <= CLOSE


class Again(nn.Module):
    """One layer that `nn.scan` calls three times."""

    options: Any

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            Step,
            variable_broadcast="params",
            split_rngs={"params": False},
            length=3,
            **self.options,
        )
        return scan(name="scan")(x, None)[0]


def test_inputs_that_do_not_arrive_are_an_error_whose_remedy_works(data):
    variables = Again({}).init(jax.random.key(0), data[0])
    with pytest.raises(ValueError, match=r"inputs of scan.dense do not arrive: .*variable_carry="):
        begin(Again({}), variables, data, ["dense"])
    model = Again({"variable_carry": "lora_eva"})
    assert ranks_of(begin(model, variables, data, ["dense"])[0]) == {"scan.dense": 4}


@pytest.mark.parametrize("transform", [jax.checkpoint, jax.jit, jax.vmap])
def test_a_transform_of_jax_around_the_call_is_refused(variables, data, transform):
    with pytest.raises(ValueError, match=r"inputs of layers do not arrive: forward .* nn.remat"):
        begin(Twin(), variables, data, forward=lambda model, x: transform(lambda x: model(x))(x))


def test_what_is_missing_is_named(variables, data, begun):
    config = lorax.LoraConfig(init_lora_weights="eva", target_modules=["a"])
    with pytest.raises(TargetError, match=r"call lorax\.linen\.initialize_eva\(model, variables, "):
        ll.apply_lora(Twin(), variables, config, data[0], rngs=0)
    with pytest.raises(ValueError, match="batches is empty: EVA needs at least one"):
        begin(Twin(), variables, [])
    with pytest.raises(ValueError, match=r"got True: set it, or call lorax\.linen\.apply"):
        ll.initialize_eva(Twin(), variables, lorax.LoraConfig(), data, run, rngs=0)
    with pytest.raises(TypeError, match=r"forward must be a function \(model, batch\), such as"):
        begin(Twin(), variables, data, forward=None)
    with pytest.raises(TargetError, match="the model carries adapters already; merge_lora"):
        begin(begun[0], begun[1], data)
    with pytest.raises(ValueError, match=r"a: the mask is \(3,\), and .* \(64,\) rows of 24"):
        begin(Twin(), variables, data, mask=lambda batch: jnp.ones(3, bool))
