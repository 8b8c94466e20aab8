"""Factors of columns: one layer, groups, SwiGLU and the MLP, against float64."""

import functools

import jax
import numpy as np
import pytest

from lorax_kernels import LoraWeights, lora_linear, lora_linear_group, lora_mlp, lora_swiglu
from lorax_kernels.lora_linear import fused
from tests.kernels.layers import (
    RATE,
    SCALES,
    check,
    differentiate,
    draw,
    draw_members,
    exact_group,
    group,
    swiglu,
    weights,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_kernel_at_a_time")]


@pytest.fixture
def inline(monkeypatch):
    """Sets how many columns are made together with the narrow product."""

    def set_width(width):
        monkeypatch.setattr(fused, "inline_width", lambda *sizes: width)

    return set_width


def with_a_zero(members):
    """Members whose factors are 0 in one column, where an output says nothing of the product."""
    for member in members:
        if "factor" in member:
            member["factor"][5] = 0
    return members


@pytest.mark.parametrize("width, sizes", [(0, [(192, 16), (128, 0), (128, 7)]), (256, [(320, 20)])])
def test_a_group_of_which_some_have_a_factor(width, sizes, inline):
    inline(width)
    members = with_a_zero(draw_members(128, sizes, bias=(0, 2), factor=(0, 1)))
    for member in members:  # far larger than the product, of which it must not take the digits
        if "bias" in member:
            member["bias"] *= 100
    check_factors(group, exact_group, draw(0, 40, 128), members)


def check_factors(function, exact, x, members, **options):
    """Compares as `check` does, and each factor's gradient where it is 0."""
    _, _, got = check(function, exact, x, members, **options)
    plain = differentiate(functools.partial(function, "xla", **options), x, members)[2]
    for ours, theirs in zip(got, plain, strict=True):
        if "factor" in ours:
            scale = np.abs(ours["factor"]).max()
            assert abs(ours["factor"][5] - theirs["factor"][5]) < 0.03 * scale


@pytest.mark.parametrize("r, width", [(8, 0), (16, 256), (64, 256)])
def test_a_residual_is_added_after_the_factor(r, width, inline):
    inline(width)
    members = with_a_zero(draw_members(320, [(320, r)], bias=(0,), factor=(0,)))
    inputs = np.stack([draw(0, 2, 12, 320), 30 * draw(3, 2, 12, 320)])

    def added(kernels, inputs, members):
        (m,) = members
        own = {"bias": m["bias"], "factor": m["factor"], "scale": SCALES[0], "kernels": kernels}
        return [lora_linear(inputs[0], m["w"], m["a"], m["b"], residual=inputs[1], **own)]

    def exact(inputs, members):
        return [inputs[1] + exact_group(inputs[0], members)[0]]

    check(added, exact, inputs, members)


def exact_swiglu(x, members, recompute=False, **options):
    gate, up = exact_group(x, members, **options)
    return [jax.nn.silu(gate) * up]


@pytest.mark.parametrize(
    "recompute, factor, rate",
    [(False, (0, 1), 0.0), (True, (0, 1), 0.0), (True, (1,), RATE), (False, (0,), 0.0)],
)
def test_gate_and_up_with_factors(recompute, factor, rate):
    members = with_a_zero(draw_members(128, [(192, 8), (192, 8)], factor=factor))
    options = {"recompute": recompute, "dropout_rate": rate, "dropout_key": jax.random.key(2)}
    check_factors(swiglu, exact_swiglu, draw(0, 136, 128), members, **options)


@pytest.mark.parametrize(
    "ranks, factor, rate, repeated",
    [
        ((8, 8, 16), (0, 1, 2), 0.0, False),
        ((8, 8, 16), (0,), 0.0, True),
        ((0, 0, 16), (1, 2), RATE, False),
        ((8, 8, 40), (0, 1, 2), RATE, False),  # what is dropped leaves no room for gate and up
        ((16, 0, 0), (0, 1, 2), 0.0, False),
    ],
)
def test_an_mlp_with_factors(ranks, factor, rate, repeated, inline):
    inline(0)
    *pair, last = ranks
    members = draw_members(128, [(192, r) for r in pair], factor=factor)
    members += draw_members(192, [(128, 0)] * 2 + [(128, last)], bias=(2,), factor=factor)[2:]
    keys = jax.random.key(2), jax.random.key(3)

    def mlp(kernels, x, members):
        options = {"dropout_rate": rate, "dropout_keys": keys, "repeated": repeated}
        options |= {"residual": x[1], "kernels": kernels}
        return [lora_mlp(x[0], *weights(members), **options)]

    def exact(inputs, members):
        own = {"dropout_rate": rate, "dropout_key": keys[0]}
        (product,) = exact_swiglu(inputs[0], members[:2], **own)
        own["dropout_key"] = keys[1]
        y = exact_group(product, members[2:], scales=SCALES[2:], **own)[0]
        return [inputs[1] + y]

    check_factors(mlp, exact, draw(0, 2, 136, 128), with_a_zero(members))


@pytest.mark.parametrize("factor", [(0, 1, 2), (2,), (1,)], ids=str)
def test_an_mlp_with_factors_is_its_layers_one_by_one(factor):
    members = draw_members(64, [(96, 4), (96, 4)], "float32", factor=factor)
    members += draw_members(96, [(64, 4)], "float32", factor=(0,) if 2 in factor else ())
    x = draw(0, 10, 64, dtype="float32")
    residual = draw(1, 10, 64, dtype="float32")

    def together(x, members):
        return lora_mlp(x, *weights(members), residual=residual)

    def apart(x, members):
        gate, up, down = weights(members)
        inner = lora_swiglu(x, gate, up)
        gated = lora_linear_group(x, [gate, up])
        np.testing.assert_allclose(inner, jax.nn.silu(gated[0]) * gated[1], rtol=1e-5, atol=1e-5)
        return residual + lora_linear_group(inner, [down])[0]

    np.testing.assert_allclose(together(x, members), apart(x, members), rtol=1e-5, atol=1e-5)


def test_a_factor_of_another_length_is_refused():
    w = draw(0, 8, 6, dtype="float32")
    member = LoraWeights(w, factor=np.ones(5, np.float32))
    with pytest.raises(ValueError, match=r"need factor \(6,\), got \(5,\)"):
        lora_linear_group(draw(1, 3, 8, dtype="float32"), [member])
