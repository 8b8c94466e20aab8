"""`lora_linear` against its reference: values, gradients, dropout, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_kernels import LoraWeights, lora_linear, lora_linear_group
from lorax_kernels.lora_linear.reference import lora_linear_reference
from tests.bounds import distance, rounding

SCALE = 2.0
CEILING = {"float64": 1e-14, "float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}
UNIT = {"float64": 1.1e-16, "float32": 6e-8, "bfloat16": 3.9e-3, "float16": 4.9e-4}


def draw(m, k, n, r, dtype):
    normal = np.random.default_rng(0).standard_normal
    shapes = [(m, k), (k, n), (k, r), (r, n), (m, n)]
    return [jnp.asarray(normal(s) / s[0] ** 0.5, dtype) for s in shapes]


def value_and_gradients(function, inputs, **options):
    @jax.jit
    def run(x, w, a, b, dy):
        y, pull = jax.vjp(lambda x, a, b: function(x, w, a, b, scale=SCALE, **options), x, a, b)
        return y, *pull(dy)

    return [np.asarray(v, np.float64) for v in run(*inputs)]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "m, k, n, r", [(1, 8, 8, 1), (127, 96, 64, 3), (64, 128, 192, 16), (33, 256, 128, 64)]
)
def test_values_and_gradients_are_as_accurate_as_the_reference(dtype, m, k, n, r):
    with jax.enable_x64(dtype == "float64"):
        inputs = draw(m, k, n, r, dtype)
        actual = value_and_gradients(lora_linear, inputs)
        plain = value_and_gradients(lora_linear_reference, inputs)
    with jax.enable_x64(True):
        exact = value_and_gradients(lora_linear_reference, [v.astype("float64") for v in inputs])
    for name, got, base, want in zip(("y", "dx", "da", "db"), actual, plain, exact, strict=True):
        # Summed in float32 at least, of which the reference has its share by luck; rounded once.
        sums = rounding(max(m, k, n), dtype="float64" if dtype == "float64" else "float32")
        bound = 2 * distance(base, want) + sums + 4 * UNIT[dtype]
        assert distance(got, want) <= min(bound, CEILING[dtype]), name


def test_float32_adapters_on_a_bfloat16_base_get_float32_gradients():
    x, w, a, b, dy = draw(16, 32, 32, 4, "bfloat16")
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    y, pull = jax.vjp(lambda a, b: lora_linear(x, w, a, b, scale=SCALE), a, b)
    da, db = pull(dy)
    assert (y.dtype, da.dtype, db.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)


def test_the_frozen_weight_gets_no_gradient_product():
    x, w, a, b, _ = draw(16, 32, 24, 4, "float32")
    loss = lambda x, w, a, b: lora_linear(x, w, a, b, scale=SCALE).sum()
    dw = jax.grad(loss, argnums=1)(x, w, a, b)
    assert not dw.any()
    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 2, 3)))(x, w, a, b))
    assert "f32[32,24] = dot_general" not in text


def test_dropout_acts_on_the_update_alone_and_repeats_in_the_backward_pass():
    inputs = draw(64, 32, 24, 4, "float32")
    options = {"dropout_rate": 0.5, "dropout_key": jax.random.key(7)}
    actual = value_and_gradients(lora_linear, inputs, **options)
    expected = value_and_gradients(lora_linear_reference, inputs, **options)
    for got, want in zip(actual, expected, strict=True):
        assert distance(got, want) <= rounding(64)
    x, w, a, b, _ = inputs
    without = lora_linear(x, w, a, jnp.zeros_like(b), scale=SCALE, **options)
    assert distance(without, x @ w) <= rounding(32)


def test_dropout_keeps_the_expected_update():
    x, w, a, b, _ = draw(8, 32, 24, 4, "float32")
    keys = jax.random.split(jax.random.key(1), 2000)
    dropped = lambda key: lora_linear(x, w, a, b, scale=1.0, dropout_rate=0.3, dropout_key=key)
    mean = jax.jit(jax.vmap(dropped))(keys).mean(0)
    assert distance(mean - x @ w, x @ a @ b) < 0.1
    np.testing.assert_array_equal(dropped(keys[0]), dropped(keys[0]))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"a": (7, 4)}, "need x .* a \\(7, 4\\)"),
        ({"b": (5, 24)}, "need x .* b \\(5, 24\\)"),
        ({"w": (31, 24)}, "need x .* w \\(31, 24\\)"),
    ],
)
def test_refuses_shapes_that_do_not_fit(change, message):
    shapes = {"x": (16, 32), "w": (32, 24), "a": (32, 4), "b": (4, 24)} | change
    with pytest.raises(ValueError, match=message):
        lora_linear(*(jnp.ones(s) for s in shapes.values()), scale=1.0)


def test_refuses_a_dropout_without_a_key_and_integer_rows():
    x, w, a, b, _ = draw(16, 32, 24, 4, "float32")
    with pytest.raises(ValueError, match="no dropout_key"):
        lora_linear(x, w, a, b, scale=1.0, dropout_rate=0.1)
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1.0"):
        lora_linear(x, w, a, b, scale=1.0, dropout_rate=1.0, dropout_key=jax.random.key(0))
    with pytest.raises(ValueError, match="floating point, got int32"):
        lora_linear(x.astype(jnp.int32), w, a, b, scale=1.0)


def test_members_go_through_jit_and_grad_as_pytrees():
    x, w, a, b = (jnp.ones(shape) for shape in ((3, 8), (8, 6), (8, 2), (2, 6)))
    loss = lambda x, members: lora_linear_group(x, members)[0].sum()
    member = LoraWeights(w, a, b, scale=0.5)
    gradient = jax.jit(jax.grad(loss, argnums=1))(x, [member])[0]
    assert gradient.scale == 0.5 and float(jnp.abs(gradient.a).min()) > 0
    assert float(jnp.abs(gradient.w).max()) == 0.0  # frozen
