"""Gradients of every method on every kind of layer, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorax import LoraConfig, apply_lora
from tests.adapters.test_sites import EXAMPLES, Holder

METHODS = {
    "lora": {},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "pissa": {"init_lora_weights": "pissa"},
    "dora from olora": {"use_dora": True, "init_lora_weights": "olora"},
}
KINDS = ["Linear", "LinearGeneral", "Einsum", "Embed", "Conv"]


def changed(layer) -> dict[str, jax.Array]:
    """Moves the parameters away from where they start; returns them."""
    for index, name in enumerate(layer.adapter.params):
        variable = layer.adapter.variable(name)
        noise = 0.3 * jax.random.normal(jax.random.key(index), variable.shape)
        variable.set_value(variable[...] + noise)
    return layer.adapter.params


def whole(params, fixed, w, scale):
    """Returns the matrix and the bias that an adapter amounts to, from its definition."""
    update = params["lora_a"] @ params["lora_b"]
    if "first_a" in fixed:
        update -= fixed["first_a"] @ fixed["first_b"]
    direction = w + scale * update
    if "magnitude" in params:
        lengths = jax.lax.stop_gradient(jnp.linalg.norm(direction, axis=0))
        direction *= (params["magnitude"] / lengths)[None, :]
    return direction, scale * params.get("lora_bias", jnp.zeros(w.shape[1]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_definition_in_float64(kind, method):
    if (kind, method) == ("Embed", "lora_bias"):
        pytest.skip("an embedding's update has no bias, and is refused")
    module, x = EXAMPLES[kind][0]()[1 if kind == "LinearGeneral" else 0]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["layer"], **METHODS[method])
    layer = apply_lora(Holder(module), config, rngs=nnx.Rngs(1)).layer
    params = changed(layer)
    linear_map = layer.linear_map
    fixed = {name: layer.adapter.values[name] for name in layer.adapter.fixed_names}
    cotangent = np.random.default_rng(0).standard_normal(layer(x).shape)
    graph, trains, rest = nnx.split(layer, nnx.LoRAParam, ...)

    def loss(trains):
        return jnp.sum(nnx.merge(graph, trains, rest)(x) * cotangent.astype(np.float32))

    found = nnx.to_pure_dict(jax.grad(loss)(trains))["attached"]["default"]

    def plain_output(matrix, bias):
        """Flax's layer in float64 with another kernel and no bias of its own."""
        other = nnx.clone(module)
        setattr(other, layer.weight_name, nnx.Param(linear_map.kernel(matrix)))
        other.dtype = jnp.float64
        if getattr(other, "bias", None) is not None:
            other.bias = nnx.Param(jnp.zeros(other.bias.shape, jnp.float64))
        y = other(x if kind == "Embed" else jnp.asarray(x, jnp.float64))
        return y + (linear_map.unfold(bias) if kind in KINDS[:3] else bias)

    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        wide = lambda tree: jax.tree.map(lambda v: jnp.asarray(np.asarray(v), jnp.float64), tree)
        w = wide(layer.matrix)

        def exact(params):
            y = plain_output(*whole(params, wide(fixed), w, layer.adapter.spec.scale))
            return jnp.sum(y * cotangent)

        expected = jax.grad(exact)(wide(params))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        gradient = np.asarray(gradient)
        assert np.linalg.norm(gradient) > 1e-3
        distance = np.linalg.norm(np.float64(found[name]) - gradient)
        assert distance <= 1e-5 * np.linalg.norm(gradient), (name, distance)
