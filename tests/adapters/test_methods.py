"""The contract of adapter methods, over every method, and one that a single file adds."""

import dataclasses
import json
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

import lorax
from lorax import LoraConfig, apply_lora, merge_lora, unload_lora, unmerge_lora
from lorax.adapters.dora import DORA
from lorax.adapters.lora import Lora
from lorax.adapters.lora_bias import LORA_BIAS
from lorax.adapters.method import Method, Parameter, Shape, Spec, merged, parts_of, shapes_of
from lorax.adapters.methods import METHODS
from lorax.adapters.nnx.adapter import Adapter, attach, cost_of
from lorax.adapters.nnx.apply import set_dropout_key, use_adapter
from lorax.adapters.nnx.tree import adapted_layers, split_trainable
from lorax.layers.linear import Linear
from lorax.layers.maps import Matmul, Way
from lorax.layers.together import apply_added, apply_mlp, apply_together
from lorax.weights.dense import DENSE
from lorax.weights.formats import FORMATS
from lorax_kernels.weights import Weight
from tests.int8 import INT8

SHAPE = Shape(24, 16)


class Columns(Lora):
    """LoRA and a trained factor per column of what comes out."""

    name = "columns"
    parameters: Mapping[str, Parameter] = {
        **Lora.parameters,
        "factor": Parameter("lora_factor_vector", "n"),
    }

    def claims(self, config):
        return config.use_rslora

    def identity(self, spec):
        return f"columns {super().identity(spec)}"

    def start(self, spec, w, key, kind):
        begun = super().start(spec, w, key, kind)
        ones = jnp.ones(w.shape[1], jnp.float32)
        return begun._replace(params={**begun.params, "factor": ones})

    def operands(self, spec, w, values):
        return dataclasses.replace(super().operands(spec, w, values), factor=values["factor"])

    def portable(self, spec, values, rank):
        raise ValueError("no plain LoRA multiplies by a factor")


COLUMNS: Method = Columns()


@pytest.fixture(params=[*METHODS, COLUMNS], ids=lambda method: method.name)
def method(request, monkeypatch):
    """A method of the list; a new one is in it by its one entry."""
    if request.param not in METHODS:
        monkeypatch.setattr("lorax.adapters.methods.METHODS", [request.param, *METHODS])
    return request.param


def settings_for(method, **more):
    chosen = {"use_rslora": method is COLUMNS, "use_dora": method is DORA}
    return LoraConfig(r=4, lora_alpha=6.0, lora_bias=method is LORA_BIAS, **chosen, **more)


class Net(nnx.Module):
    def __init__(self, method, dtype=jnp.float32):
        has_bias = method is LORA_BIAS  # without one it cannot be merged
        make = lambda k, n, bias=has_bias: Linear(
            k, n, use_bias=bias, dtype=dtype, param_dtype=dtype, rngs=rngs
        )
        rngs = nnx.Rngs(0)
        self.gate_proj, self.up_proj, self.down_proj = make(24, 16), make(24, 16), make(16, 24)
        self.lone = make(24, 24, bias=True)

    def __call__(self, x):
        x = apply_mlp(self.gate_proj, self.up_proj, self.down_proj, x, x, False)
        return apply_added(self.lone, x, x)


def adapt(method, net=None, std=0.2, **more):
    """Returns a net with adapters of a method, some way from where they start."""
    model = apply_lora(net or Net(method), settings_for(method, **more), rngs=nnx.Rngs(1))
    for index, layer in enumerate(adapted_layers(model).values()):
        assert layer.adapter.spec.method is method
        for place, name in enumerate(method.parameters):
            variable = layer.adapter.variable(name)
            key = jax.random.fold_in(jax.random.key(index), place)
            noise = std * jax.random.normal(key, variable.shape)
            variable.set_value(variable[...] + noise)
    return model


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(5), (2, 3, 24))


def test_a_fresh_adapter_changes_no_bit(method):
    # In bfloat16, where any other order of rounding shows.
    net = Net(method, jnp.bfloat16)
    adapted = apply_lora(net, settings_for(method), rngs=nnx.Rngs(1))
    assert len(adapted_layers(adapted)) == 4
    for seed in range(3):
        x = 3 * jax.random.normal(jax.random.key(seed), (4, 5, 24), jnp.bfloat16)
        np.testing.assert_array_equal(np.float32(adapted(x)), np.float32(net(x)))


def test_parameters_have_the_shapes_names_and_costs_that_are_stated(method):
    model = adapt(method)
    for layer in adapted_layers(model).values():
        shape, spec = Shape(layer.in_features, layer.out_features), layer.adapter.spec
        found = {name: value.shape for name, value in layer.adapter.params.items()}
        assert found == shapes_of(spec, shape)
        assert cost_of(layer).parameters == sum(
            value.size for value in layer.adapter.params.values()
        )
        assert {v.dtype for v in layer.adapter.params.values()} == {jnp.dtype("float32")}
        assert 0 < cost_of(layer).kept and 0 < cost_of(layer).streamed
    _, trainable, _ = split_trainable(model)
    assert len(jax.tree.leaves(trainable)) == 4 * len(method.parameters)


def test_a_layer_computes_what_is_merged_and_the_operands_say(method):
    spec = Spec(method, r=4, lora_alpha=6.0, scale=1.5)
    w = jax.random.normal(jax.random.key(0), SHAPE)
    params, fixed = method.start(spec, w, jax.random.key(1), "matmul")
    params = {n: p + jnp.linspace(0.0, 0.1, p.size).reshape(p.shape) for n, p in params.items()}
    values = {**params, **fixed}
    x = jax.random.normal(jax.random.key(2), (7, SHAPE.inputs))
    whole = np.asarray(x, np.float64) @ np.asarray(
        merged(spec, Matmul((SHAPE.inputs,), (SHAPE.outputs,)), w, values), np.float64
    )
    operands = method.operands(spec, w, values)
    assert operands.w is w and operands.scale == spec.scale
    bias = 0 if operands.bias is None else np.asarray(operands.bias, np.float64)
    layer = Linear(*SHAPE, use_bias=False, rngs=nnx.Rngs(0))
    layer.freeze(w)
    layer.attached["default"], layer.active = Adapter(spec, params, fixed), "default"
    np.testing.assert_allclose(layer(x), whole + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", [*FORMATS, INT8], ids=lambda format: format.name)
def test_a_base_stored_in_any_format_is_adapted_and_merged_as_what_is_meant(method, format, x):
    whole, stored = Net(method), Net(method)
    for net in (whole, stored):
        for layer in (net.gate_proj, net.up_proj, net.down_proj, net.lone):
            matrix = format.store(layer.kernel[...])
            layer.freeze(format.dense(matrix) if net is whole else matrix)
    pair = [adapt(method, net) for net in (whole, stored)]
    np.testing.assert_allclose(pair[1](x), pair[0](x), rtol=1e-5, atol=1e-5)
    merged = [merge_lora(model)(x) for model in pair]
    np.testing.assert_allclose(merged[1], merged[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(merged[1], pair[1](x), rtol=2e-5, atol=2e-5)
    base = unload_lora(pair[1])
    np.testing.assert_array_equal(base(x), stored(x))
    for layer in (base.gate_proj, base.lone):
        assert isinstance(layer.kernel.get_value(), Weight) == (format is not DENSE)


def test_layers_together_compute_what_each_does_alone(method, x):
    model = adapt(method)
    layers = model.gate_proj, model.up_proj
    for got, layer in zip(apply_together(layers, x), layers, strict=True):
        np.testing.assert_allclose(got, layer(x), rtol=1e-5, atol=1e-5)
    alone = x + model.down_proj(jax.nn.silu(model.gate_proj(x)) * model.up_proj(x))
    together = apply_mlp(*layers, model.down_proj, x, x, False)
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)
    added = apply_added(model.lone, x, x)
    np.testing.assert_allclose(added, x + model.lone(x), rtol=1e-5, atol=1e-5)


def test_merged_equals_applied_and_unmerged_and_unloaded_the_base(method, x):
    net = Net(method)
    model = adapt(method, net)
    assert np.abs(np.asarray(model(x) - net(x))).max() > 0.1
    for whole in (merge_lora(model), kept := merge_lora(model, keep_adapters=True)):
        np.testing.assert_allclose(whole(x), model(x), rtol=2e-5, atol=2e-5)
    back = unmerge_lora(kept)
    np.testing.assert_allclose(back(x), model(x), rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(unload_lora(model)(x), net(x))
    assert not adapted_layers(unload_lora(model))


def test_without_an_active_adapter_a_layer_is_its_base(method, x):
    net = Net(method)
    model = adapt(method, net)
    adapted = np.asarray(model(x))
    use_adapter(model, None)
    np.testing.assert_array_equal(model(x), net(x))
    with pytest.raises(ValueError, match="no layer has an adapter 'other'; there is default"):
        use_adapter(model, "other")
    use_adapter(model, "default")
    np.testing.assert_array_equal(model(x), adapted)
    with pytest.raises(ValueError, match="is merged; unmerge_lora first"):
        use_adapter(merge_lora(model, keep_adapters=True), None)


def test_dropout_is_drawn_from_the_key_and_off_in_evaluation(method, x):
    model = adapt(method, lora_dropout=0.5)
    set_dropout_key(model, jax.random.key(0))
    one = np.asarray(model(x))
    np.testing.assert_array_equal(model(x), one)
    set_dropout_key(model, jax.random.key(1))
    assert not np.allclose(model(x), one)
    model.eval()
    np.testing.assert_allclose(model(x), merge_lora(model)(x), rtol=2e-5, atol=2e-5)


def test_files_hold_every_parameter_under_the_stated_key(method, tmp_path, x):
    model = adapt(method)
    lorax.save_adapter(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, layer in adapted_layers(model).items():
        for parameter, key in method.parameters.items():
            stored = tensors.pop(f"base_model.model.{name}.{key.suffix}").T
            np.testing.assert_array_equal(stored, layer.adapter.params[parameter])
    assert not tensors
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert method.settings.items() <= settings.items()
    again = lorax.load_adapter(Net(method), tmp_path / "out")
    np.testing.assert_array_equal(again(x), model(x))


@pytest.mark.parametrize("axis", [0, 1])
def test_parameters_are_divided_as_the_matrix_is(method, axis, x):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    base = PartitionSpec(*(("data", None) if axis == 0 else (None, "data")))
    spec = Spec(method, r=4, lora_alpha=6.0, scale=1.5)
    w = jax.random.normal(jax.random.key(0), SHAPE)
    params, fixed = method.start(spec, w, jax.random.key(1), "matmul")
    parts = parts_of(method, base)
    assert parts.keys() == params.keys()
    place = lambda value, part: jax.device_put(value, NamedSharding(mesh, part))
    placed = {name: place(value, parts[name]) for name, value in params.items()}
    assert any(not value.is_fully_replicated for value in placed.values())
    x = x.reshape(-1, SHAPE.inputs)

    @jax.jit
    def run(w, params):
        operands = method.operands(spec, w, {**params, **fixed})
        return Matmul((SHAPE.inputs,), (SHAPE.outputs,)).apply(x, operands, Way(), x.dtype)

    np.testing.assert_allclose(run(place(w, base), placed), run(w, params), rtol=1e-5, atol=1e-5)


def test_a_resumed_run_must_share_what_is_stated(method):
    differing = (4, 1.5, 0.0), (8, 1.5, 0.0), (4, 2.0, 0.0), (4, 1.5, 0.1)
    specs = [Spec(method, r, 6.0, scale, dropout) for r, scale, dropout in differing]
    assert len({method.identity(spec) for spec in specs}) == 4
    others = {other.identity(specs[0]) for other in [*METHODS, COLUMNS] if other is not method}
    assert method.identity(specs[0]) not in others


def test_the_active_adapter_alone_trains_and_computes(method, x):
    model = adapt(method)
    first = np.asarray(model(x))
    paths = lambda: {".".join(map(str, p)) for p, _ in nnx.to_flat_state(split_trainable(model)[1])}
    assert {path.split(".")[2] for path in paths()} == {"default"}
    layer, spec = model.down_proj, model.down_proj.adapter.spec
    attach(layer, spec, jax.random.key(8), "second")
    assert {path for path in paths() if path.startswith("down_proj")} == {
        f"down_proj.attached.second.{name}" for name in method.parameters
    }
    assert not np.allclose(model(x), first)  # a new one has changed nothing yet
    use_adapter(model, None)
    assert not paths()
    with pytest.raises(ValueError, match="carries adapters already"):
        apply_lora(model, settings_for(method), rngs=nnx.Rngs(1))
    assert not any(m.attached for m in (unload_lora(model).down_proj, unload_lora(model).lone))
    use_adapter(model, "default")
    np.testing.assert_array_equal(model(x), first)


def test_a_bias_of_the_update_is_merged_into_a_bias_alone(x):
    net = nnx.Sequential(Linear(24, 24, use_bias=False, rngs=nnx.Rngs(0)))
    model = apply_lora(net, LoraConfig(r=4, lora_bias=True), rngs=nnx.Rngs(1))
    with pytest.raises(
        ValueError, match=r"layers\.0: its lora_bias cannot be merged, because the "
    ):
        merge_lora(model)
