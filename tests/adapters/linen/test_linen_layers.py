"""The contract of adapters on Linen's layers: every kind with every method."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lorax
import lorax.linen as ll
from lorax.adapters import stack
from lorax.adapters.lora_bias import LORA_BIAS
from lorax.adapters.methods import METHODS
from lorax.layers.maps import bias_of
from tests.adapters.linen.kinds import KINDS, One, moved, settings_for
from tests.bounds import EXACT, distance, in_float64
from tests.jaxprs import equations, on_h200

CASES = [
    (name, method)
    for name in KINDS
    for method in METHODS
    if not (KINDS[name].ids and method is LORA_BIAS)
]
every_case = pytest.mark.parametrize(
    ("kind", "method"),
    [(KINDS[name], method) for name, method in CASES],
    ids=[f"{name}-{method.name}" for name, method in CASES],
)


def begun(kind, method, **options):
    model = kind.model(**options)
    x = kind.inputs()
    variables = model.init(jax.random.key(0), x)
    if "bias" in variables["params"]["layer"]:
        bias = variables["params"]["layer"]["bias"]
        filled = jax.random.normal(jax.random.key(3), bias.shape, bias.dtype)
        variables["params"]["layer"]["bias"] = filled
    return model, variables, x, *ll.apply_lora(model, variables, settings_for(method), x, rngs=0)


@every_case
def test_a_layer_begins_as_its_base_and_merges_saves_and_loads(kind, method, tmp_path):
    model, plain, x, adapted, variables = begun(kind, method)
    fresh = adapted.apply(variables, x)
    if kind is KINDS["einsum_places"]:  # there jnp.einsum sums in another order than a matmul
        np.testing.assert_allclose(fresh, model.apply(plain, x), rtol=1e-6, atol=1e-6)
    else:
        np.testing.assert_array_equal(fresh, model.apply(plain, x))
    variables = moved(variables)
    got = adapted.apply(variables, x)
    assert np.abs(np.asarray(got - fresh)).max() > 0.1
    path = ll.save_adapter(adapted, variables, tmp_path / "adapter")
    loaded, again = ll.load_adapter(model, plain, path, x)
    np.testing.assert_array_equal(loaded.apply(again, x), got)
    if method is LORA_BIAS and "bias" not in plain["params"]["layer"]:
        with pytest.raises(ValueError, match="layer: its lora_bias cannot be merged"):
            ll.merge_lora(adapted, variables)
        return
    merged = ll.merge_lora(adapted, variables)
    assert jax.tree.structure(merged) == jax.tree.structure(plain)
    np.testing.assert_allclose(model.apply(merged, x), got, rtol=2e-5, atol=2e-5)


@every_case
def test_outputs_and_gradients_are_those_of_the_nnx_layer(kind, method):
    _, plain, x, adapted, variables = begun(kind, method)
    variables = moved(variables)
    twin = lorax.apply_lora(kind.in_nnx(plain["params"]), settings_for(method), rngs=0)
    for name, value in variables["lora"]["layer"].items():
        twin.layer.adapter.variable(name).set_value(value)

    def of_linen(lora):
        y = adapted.apply({**variables, "lora": lora}, x)
        return (jnp.sin(y)).sum(), y

    def of_nnx(model):
        y = model(x)
        return jnp.sin(y).sum(), y

    got, y = jax.grad(of_linen, has_aux=True)(variables["lora"])
    trains = nnx.DiffState(0, nnx.Param)
    want, z = nnx.grad(of_nnx, argnums=trains, has_aux=True)(twin)
    np.testing.assert_array_equal(y, z)
    want = {path[-1]: v.get_value() for path, v in nnx.to_flat_state(want)}
    assert got["layer"].keys() == want.keys()
    for name, value in got["layer"].items():
        np.testing.assert_array_equal(value, want[name], err_msg=name)


@every_case
def test_gradients_are_those_through_the_merged_weights(kind, method):
    with in_float64():
        model, plain, _, adapted, variables = begun(kind, method, param_dtype=jnp.float64)
        variables = moved(variables)
        x = kind.inputs(jnp.float64)
        (layer,) = adapted.layers
        base = plain["params"]["layer"]

        def merged(lora):
            whole = {**variables, "lora": lora}
            w = layer.linear_map.matrix(base[layer.weight])
            values = layer.values(whole)
            matrix = stack.merged(layer.spec, layer.linear_map, w, values)
            own = stack.operands(layer.spec, w, values).bias
            more = (
                {}
                if own is None
                else {"bias": bias_of(layer.linear_map, own) + base.get("bias", 0)}
            )
            params = {**base, layer.weight: layer.linear_map.kernel(matrix), **more}
            return jnp.sin(model.apply({"params": {"layer": params}}, x)).sum()

        def adapting(lora):
            return jnp.sin(adapted.apply({**variables, "lora": lora}, x)).sum()

        if method is LORA_BIAS and "bias" not in base:
            pytest.skip("the layer has no bias to merge into")
        got, want = jax.grad(adapting)(variables["lora"]), jax.grad(merged)(variables["lora"])
        for name, value in got["layer"].items():
            assert value.dtype == jnp.float64
            assert distance(value, want["layer"][name]) < EXACT, name


@pytest.mark.parametrize("kind", ["dense", "conv", "embed", "einsum"])
def test_a_layer_computes_in_the_dtype_of_its_base(kind):
    kind = KINDS[kind]
    for options in ({"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}):
        with jax.numpy_dtype_promotion("standard"):
            model, plain, x, adapted, variables = begun(kind, METHODS[-1], **options)
            want = model.apply(plain, x)
            got = adapted.apply(variables, x)
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
        assert {str(value.dtype) for value in jax.tree.leaves(variables["lora"])} == {"float32"}


def test_a_dense_layer_runs_the_kernel_that_nnx_runs():
    model = One(nn.Dense(256, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))
    x = jnp.zeros((256, 256), jnp.bfloat16)
    plain = model.init(jax.random.key(0), x)
    config = lorax.LoraConfig(r=16, target_modules=["layer"])
    adapted, variables = ll.apply_lora(model, plain, config, x, rngs=0)
    base = nnx.Linear(256, 256, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    twin = lorax.apply_lora(nnx.Dict(layer=base), config, rngs=0)
    lorax.set_kernels(twin, "pallas")
    with on_h200():
        run = adapted.with_kernels("pallas").apply
        ours = jax.make_jaxpr(run)(variables, x)
        theirs = jax.make_jaxpr(lambda x: twin["layer"](x))(x)
    assert calls(ours) == calls(theirs) != []


def calls(jaxpr):
    """Returns the kernels that a function launches, with what they are given."""
    found = [e for e in equations(jaxpr.jaxpr) if e.primitive.name in ("mpmd_map", "pallas_call")]
    return [[str(v.aval) for v in equation.invars] for equation in found]
