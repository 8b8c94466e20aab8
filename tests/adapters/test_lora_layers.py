"""`apply_lora` on any NNX model: identity at first, what trains, dropout, merge and unmerge."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lorax
from lorax import LoraConfig, apply_lora, merge_lora, unmerge_lora
from lorax.adapters.nnx.apply import set_dropout_key
from lorax.adapters.nnx.tree import adapted_layers, split_trainable
from lorax.devices.mesh import make_mesh
from lorax.layers.carrier import Frozen
from lorax.layers.together import apply_added, apply_mlp
from lorax_kernels import lora_linear


class Block(nnx.Module):
    def __init__(self, rngs):
        self.fc1 = nnx.Linear(16, 32, rngs=rngs)
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.fc2 = nnx.Linear(32, 16, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.fc2(nnx.gelu(self.norm(self.fc1(x))))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.scale = nnx.Param(jnp.ones((1, 16)))
        self.blocks = nnx.List([Block(rngs) for _ in range(3)])
        self.shared = nnx.Linear(16, 16, rngs=rngs)
        self.again = self.shared
        self.head = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        x = x * self.scale[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.again(self.shared(x)))


@pytest.fixture
def net():
    net = Net(nnx.Rngs(0))
    for index, (_, variable) in enumerate(nnx.iter_graph(net)):
        if isinstance(variable, nnx.Param) and variable.ndim == 1:
            variable.set_value(jax.random.normal(jax.random.key(index), variable.shape))
    return net


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (5, 16))


def adapt(net, **settings):
    settings = {"r": 4, "target_modules": ["fc1", "fc2", "head", "again"]} | settings
    return apply_lora(net, LoraConfig(**settings), rngs=nnx.Rngs(3))


def randomise(model, std=0.3):
    for index, layer in enumerate(adapted_layers(model).values()):
        key = jax.random.key(index)
        layer.adapter.lora_b.set_value(std * jax.random.normal(key, layer.adapter.lora_b.shape))
    return model


def trained_paths(model):
    _, trainable, _ = split_trainable(model)
    return {".".join(map(str, path)) for path, _ in nnx.to_flat_state(trainable)}


def test_a_new_adapter_changes_nothing_and_leaves_the_model_alone(net, x):
    before = jax.tree.map(np.asarray, nnx.state(net))
    adapted = adapt(net)
    np.testing.assert_array_equal(adapted(x), net(x))
    assert not adapted_layers(net)
    assert len(adapted_layers(adapted)) == 8
    randomise(adapted)
    assert not np.allclose(adapted(x), net(x))
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(net))


def test_a_layer_held_twice_is_adapted_in_both_places(net):
    adapted = adapt(net)
    assert adapted.again.adapter is not None
    assert adapted.again is adapted.shared


def test_exactly_a_and_b_train(net):
    paths = trained_paths(adapt(net))
    assert all(p.endswith(("lora_a", "lora_b")) for p in paths)
    assert len(paths) == 2 * 8


def test_a_is_kaiming_uniform_or_gaussian_as_in_peft():
    wide = nnx.List([nnx.Linear(400, 300, rngs=nnx.Rngs(0))])
    uniform = apply_lora(wide, LoraConfig(r=64, target_modules=["0"]), rngs=nnx.Rngs(1))
    a = np.asarray(uniform[0].adapter.lora_a[...])
    assert np.abs(a).max() <= 400**-0.5 and np.abs(a).max() > 0.99 * 400**-0.5
    assert abs(a.std() / (400**-0.5 / 3**0.5) - 1) < 0.02
    config = LoraConfig(r=64, target_modules=["0"], init_lora_weights="gaussian")
    gaussian = apply_lora(wide, config, rngs=nnx.Rngs(1))
    assert abs(np.asarray(gaussian[0].adapter.lora_a[...]).std() * 64 - 1) < 0.02


@pytest.mark.parametrize(
    "bias, expected",
    [
        ("none", set()),
        ("lora_only", {"blocks.0.fc1.bias", "blocks.1.fc1.bias", "blocks.2.fc1.bias"}),
        (
            "all",
            {f"blocks.{i}.{n}.bias" for i in range(3) for n in ("fc1", "norm")}
            | {"head.bias", "again.bias"},
        ),
    ],
)
def test_bias_setting_decides_which_biases_train(net, x, bias, expected):
    adapted = adapt(net, target_modules=["fc1", "fc2"], bias=bias)
    others = {p for p in trained_paths(adapted) if "lora_" not in p}
    assert others == expected
    np.testing.assert_array_equal(adapted(x), net(x))


def test_modules_to_save_train_whole(net):
    adapted = adapt(net, target_modules=["fc1"], modules_to_save=["head", "blocks.1"])
    others = {p for p in trained_paths(adapted) if "lora_" not in p}
    block = {f"blocks.1.{n}" for n in ("fc1.kernel", "fc1.bias", "fc2.kernel")}
    assert others == block | {
        "blocks.1.norm.scale",
        "blocks.1.norm.bias",
        "head.kernel",
        "head.bias",
    }
    assert set(adapted_layers(adapted)) == {"blocks.0.fc1", "blocks.2.fc1"}


def test_what_trains_is_float32_on_a_bfloat16_base():
    base = nnx.List(
        [nnx.Linear(8, 8, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))]
    )
    config = LoraConfig(r=2, target_modules=["0"], bias="lora_only")
    adapted = apply_lora(base, config, rngs=nnx.Rngs(0))
    _, trainable, frozen = split_trainable(adapted)
    assert {v.dtype for v in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}
    assert {v.dtype for v in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
    assert adapted[0](jnp.ones((1, 8), jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("rslora", [False, True])
def test_the_update_is_scaled_as_documented(net, x, rslora):
    adapted = randomise(adapt(net, lora_alpha=6, use_rslora=rslora, rank_pattern={"head": 2}))
    layer = adapted.head
    scale = 6 / 2**0.5 if rslora else 6 / 2
    expected = net.head(x) + scale * (x @ layer.adapter.lora_a[...] @ layer.adapter.lora_b[...])
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_merged_equals_adapted_and_unmerged_equals_base(net, x):
    adapted = randomise(adapt(net))
    merged = merge_lora(adapted)
    assert not adapted_layers(merged)
    np.testing.assert_allclose(merged(x), adapted(x), rtol=1e-5, atol=1e-5)
    kept = merge_lora(adapted, keep_adapters=True)
    np.testing.assert_allclose(kept(x), adapted(x), rtol=1e-5, atol=1e-5)
    back = unmerge_lora(kept)
    np.testing.assert_allclose(back.head.kernel[...], net.head.kernel[...], rtol=0, atol=1e-6)
    np.testing.assert_allclose(back(x), adapted(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="merged already"):
        merge_lora(kept)
    with pytest.raises(ValueError, match="no layer is merged"):
        unmerge_lora(adapted)
    with pytest.raises(ValueError, match="no adapters"):
        merge_lora(net)


def test_merging_refuses_values_that_are_not_finite(net):
    adapted = randomise(adapt(net))
    adapted.head.adapter.lora_b.set_value(jnp.full_like(adapted.head.adapter.lora_b[...], jnp.inf))
    with pytest.raises(ValueError, match=r"head: merging gives values that are not finite"):
        merge_lora(adapted)


def test_dropout_needs_a_fresh_key_and_eval_turns_it_off(net, x):
    adapted = randomise(adapt(net, lora_dropout=0.5))
    with pytest.raises(ValueError, match="needs a fresh key every step"):
        adapted(x)
    set_dropout_key(adapted, jax.random.key(0))
    one = adapted(x)
    np.testing.assert_array_equal(one, adapted(x))
    set_dropout_key(adapted, jax.random.key(1))
    assert not np.allclose(one, adapted(x))
    adapted.eval()
    merged = merge_lora(adapted)
    np.testing.assert_allclose(adapted(x), merged(x), rtol=1e-5, atol=1e-5)


def test_training_lowers_the_loss_and_never_touches_the_base(net, x):
    adapted = adapt(net)
    y = jax.random.normal(jax.random.key(9), (5, 4))

    def loss_fn(model, batch):
        return ((model(batch["x"]) - batch["y"]) ** 2).sum(), jnp.float32(batch["y"].size)

    step, state = lorax.make_train_step(adapted, optax.adam(1e-2), loss_fn)
    batch = {"x": x[None], "y": y[None]}
    frozen = jax.tree.map(np.asarray, step.frozen)
    losses = []
    for _ in range(30):
        with jax.numpy_dtype_promotion("standard"):  # optax.adam needs it
            state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, frozen, step.frozen)
    trained = lorax.merge_state(adapted, state)
    total, count = loss_fn(trained, {"x": x, "y": y})
    assert float(total / count) < losses[-1] * 1.01


def test_dropout_masks_differ_between_steps_and_repeat_with_the_seed(net, x):
    adapted = randomise(adapt(net, lora_dropout=0.5))
    loss_fn = lambda model, batch: (model(batch).sum(), jnp.float32(5.0))

    def losses(seed):
        step, state = lorax.make_train_step(adapted, optax.sgd(0.0), loss_fn, seed=seed)
        found = []
        for _ in range(3):
            state, metrics = step(state, jnp.stack([x, x]))
            found.append(float(metrics["loss"]))
        return found

    first = losses(0)
    assert len(set(first)) == 3
    assert first == losses(0) != losses(1)


def test_a_step_on_a_mesh_runs_under_that_mesh(net, x):
    # The kernels ask which axes divide the rows; without the mesh they would take all of them.
    mesh, seen = make_mesh(4), []

    def loss_fn(model, batch):
        seen.append(jax.sharding.get_abstract_mesh().shape)
        return model(batch).sum(), jnp.float32(4.0)

    step, state = lorax.make_train_step(adapt(net), optax.sgd(0.0), loss_fn, mesh=mesh)
    batch = jnp.stack([x[:4]])
    step(state, batch)
    step, state = lorax.make_train_step(adapt(net), optax.sgd(0.0), loss_fn, mesh=mesh)
    step.compile(state, batch)(state, batch)
    assert len(seen) >= 2 and all(shape == {"data": 4} for shape in seen)


def test_a_free_choice_of_kernels_is_xla_unless_training(net, x, monkeypatch):
    asked = []

    def record(x, *operands, kernels, **options):
        asked.append(kernels)
        return lora_linear(x, *operands, kernels="xla", **options)

    monkeypatch.setattr("lorax.layers.maps.lora_linear", record)
    adapted = adapt(net)
    for kernels, training, wanted in (
        ("auto", True, "auto"),
        ("auto", False, "xla"),
        ("pallas", False, "pallas"),
    ):
        lorax.set_kernels(adapted, kernels)
        adapted.train() if training else adapted.eval()
        asked.clear()
        adapted(x)
        assert set(asked) == {wanted}


def test_kernels_are_chosen_by_name(net):
    adapted = adapt(net)
    lorax.set_kernels(adapted, "xla")
    assert {layer.kernels for layer in adapted_layers(adapted).values()} == {"xla"}
    with pytest.raises(ValueError, match="kernels must be auto, pallas or xla, got 'palas'"):
        lorax.set_kernels(adapted, "palas")  # type: ignore[arg-type]


def test_the_models_own_dropout_gets_a_fresh_mask_every_step(x):
    class Dropping(nnx.Module):
        def __init__(self, rngs):
            self.fc = nnx.Linear(16, 4, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.fc(self.drop(x))

    config = LoraConfig(r=2, target_modules=["fc"])
    adapted = apply_lora(Dropping(nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    loss_fn = lambda model, batch: (model(batch).sum(), jnp.float32(1.0))
    step, state = lorax.make_train_step(adapted, optax.sgd(0.0), loss_fn)
    found = []
    for _ in range(3):
        state, metrics = step(state, x[None])
        found.append(float(metrics["loss"]))
    assert len(set(found)) == 3


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"r": 17, "target_modules": ["fc1"]}, r"rank must be in \[1, 16\] for a 16 × 32"),
        ({"target_modules": ["norm"]}, "only layers that multiply"),
        ({"target_modules": ["fc3"]}, "matches no linear module; did you mean fc[12], fc[12]"),
        (
            {"target_modules": ["fc2"], "bias": "lora_only"},
            "no layer of a target module has a bias",
        ),
    ],
)
def test_refuses_what_cannot_be_adapted(net, settings, message):
    with pytest.raises(ValueError, match=message):
        adapt(net, **settings)


def test_refuses_to_adapt_twice_and_to_train_nothing(net):
    adapted = adapt(net)
    with pytest.raises(ValueError, match="carries adapters already"):
        adapt(adapted)
    for path, variable in nnx.iter_graph(net):
        if isinstance(variable, nnx.Param):
            assert not isinstance(variable, Frozen), path
    plain = nnx.List([])
    with pytest.raises(ValueError, match="nothing would train"):
        lorax.make_train_step(plain, optax.sgd(0.1), lambda m, b: (0.0, 1))


class Odd(nnx.Linear):
    def __call__(self, x):
        return jnp.dot(x, self.kernel[...]) * 2


def linear(**options):
    return nnx.Linear(4, 4, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize(
    "layer, reason",
    [
        (lambda: Odd(4, 4, rngs=nnx.Rngs(0)), "a __call__ of its own"),
        (lambda: linear(precision="highest"), "sets precision=highest"),
        (lambda: linear(dot_general=lambda *a, **k: None), "dot_general or promote_dtype"),
        (lambda: linear(promote_dtype=lambda x, **k: x), "dot_general or promote_dtype"),
    ],
)
def test_a_layer_with_ways_of_its_own_is_refused_or_left_out_by_name(layer, reason):
    model = nnx.List([layer(), linear()])
    with pytest.raises(ValueError, match=f"0 cannot be adapted: .*{reason}.*exclude_modules"):
        apply_lora(model, LoraConfig(r=2), rngs=nnx.Rngs(0))
    config = LoraConfig(r=2, exclude_modules=["0"])
    assert set(adapted_layers(apply_lora(model, config, rngs=nnx.Rngs(0)))) == {"1"}


def test_modules_in_tuples_are_refused_not_overlooked():
    class Holder(nnx.Module):
        def __init__(self):
            self.fc = linear()
            self.pair = nnx.data((linear(), linear()))

    with pytest.raises(ValueError, match=r"pair.* is held in a tuple, list or dict"):
        apply_lora(Holder(), LoraConfig(r=2, target_modules=["fc"]), rngs=nnx.Rngs(0))


LAYER = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}


class Mlp(nnx.Module):
    """Gate and up of one dtype, and down."""

    def __init__(self, rngs, **of_down):
        make = lambda k, n, **options: nnx.Linear(k, n, rngs=rngs, **LAYER | options)
        self.gate, self.up = (make(8, 12, use_bias=False) for _ in range(2))
        self.down = make(12, 8, **of_down)


@pytest.mark.parametrize("of_residual", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "of_down",
    [
        {},
        {"use_bias": False},
        {"preferred_element_type": jnp.float32},
        {"dtype": jnp.float32},
        {"merged": True},
        {"adapted": False},
    ],
)
def test_what_a_layer_is_added_to_is_added_once_and_not_rounded_more(of_down, of_residual):
    merged, adapted = of_down.get("merged", False), of_down.get("adapted", True)
    options = {name: v for name, v in of_down.items() if name not in ("merged", "adapted")}
    model = Mlp(nnx.Rngs(0), **options)
    names = ["gate", "up", *(["down"] if adapted else [])]
    model = randomise(apply_lora(model, LoraConfig(r=4, target_modules=names), rngs=nnx.Rngs(1)))
    if merged:
        model.down = merge_lora(model, keep_adapters=True).down
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)) * 3, jnp.bfloat16)
    # So large that a sum which is rounded loses most of what is added.
    residual = jnp.full((2, 3, 8), 100.0, of_residual)
    with jax.numpy_dtype_promotion("standard"):
        product = jax.nn.silu(model.gate(x)) * model.up(x)
        alone = residual + model.down(product)
        together = apply_mlp(model.gate, model.up, model.down, x, residual, False)
        single = apply_added(model.down, product, residual)
    # What bfloat16 rounds at 100 is 0.125 in the mean; that of the products is less.
    most = 0.2 if alone.dtype == jnp.bfloat16 else 0.06
    for got in (together, single):
        assert got.dtype == alone.dtype
        assert np.abs(np.float32(got) - np.float32(alone)).mean() < most
    assert np.abs(np.float32(alone) - 100).mean() > 4
