"""Factors of columns: one layer, groups, SwiGLU and the MLP, against float64."""

import jax
import numpy as np
import pytest

from lorax_kernels import LoraWeights, lora_linear, lora_linear_group, lora_mlp, lora_swiglu
from tests.kernels.layers import (
    SCALES,
    check,
    draw,
    draw_members,
    exact_group,
    group,
    swiglu,
    weights,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_kernel_at_a_time")]


def test_a_group_of_which_some_have_a_factor():
    sizes = [(192, 16), (128, 0), (128, 7)]
    members = draw_members(128, sizes, bias=(0, 2), factor=(0, 1))
    check(group, exact_group, draw(0, 40, 128), members)


def test_a_residual_is_added_after_the_factor():
    members = draw_members(128, [(128, 8)], bias=(0,), factor=(0,))
    inputs = np.stack([draw(0, 2, 12, 128), draw(3, 2, 12, 128)])

    def added(kernels, inputs, members):
        (m,) = members
        own = {"bias": m["bias"], "factor": m["factor"], "scale": SCALES[0], "kernels": kernels}
        return [lora_linear(inputs[0], m["w"], m["a"], m["b"], residual=inputs[1], **own)]

    def exact(inputs, members):
        return [inputs[1] + exact_group(inputs[0], members)[0]]

    check(added, exact, inputs, members)


def test_gate_and_up_with_factors():
    def exact(x, members):
        gate, up = exact_group(x, members)
        return [jax.nn.silu(gate) * up]

    members = draw_members(128, [(128, 8), (128, 8)], factor=(0, 1))
    check(swiglu, exact, draw(0, 40, 128), members)


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
