"""A weight that is stored as no array: the operations on it are those on its dense matrix."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_kernels import LoraWeights, lora_linear, lora_linear_group, lora_mlp, lora_swiglu
from lorax_kernels.dispatch import Kernels
from lorax_kernels.lora_linear import choice
from tests.bounds import EXACT, distance
from tests.int8 import store
from tests.jaxprs import equations, on_h200

K, N, M, RANK = 128, 192, 24, 4


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) / shape[0] ** 0.5)


def operands(*sizes, dtype="float64"):
    """Stored matrices of (k, n), each with an adapter."""
    return [
        LoraWeights(
            store(draw(i, k, n).astype(dtype)),
            draw(i + 10, k, RANK).astype(dtype),
            draw(i + 20, RANK, n).astype(dtype),
            scale=2.0,
        )
        for i, (k, n) in enumerate(sizes)
    ]


def linear(x, member, **options):
    w, a, b = member.w, member.a, member.b
    return lora_linear(x, w, a, b, scale=member.scale, **options)


def group(x, *members, **options):
    return lora_linear_group(x, [*members, LoraWeights(members[0].w)], **options)


def mlp(x, *members, **options):
    return lora_mlp(x, *members, residual=x, **options)


CALLS = {
    "linear": (linear, [(K, N)]),
    "group": (group, [(K, N), (K, 64)]),
    "swiglu": (lora_swiglu, [(K, N), (K, N)]),
    "swiglu, recomputed": (functools.partial(lora_swiglu, recompute=True), [(K, N), (K, N)]),
    "mlp": (mlp, [(K, N), (K, N), (N, K)]),
}


def as_arrays(members):
    return [
        LoraWeights(member.w.dense(), member.a, member.b, member.bias, member.scale)
        for member in members
    ]


def pulled(function, x, members):
    """Returns the outputs, what pulls back to x and the adapters, and cotangents."""

    def call(x, adapters):
        adapted = [
            LoraWeights(member.w, a, b, scale=member.scale)
            for member, (a, b) in zip(members, adapters, strict=True)
        ]
        return function(x, *adapted)

    y, pull = jax.vjp(call, x, [(member.a, member.b) for member in members])
    return y, pull, jax.tree.map(lambda leaf: draw(99, *leaf.shape).astype(leaf.dtype), y)


@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients_are_those_of_the_dense_matrix(name):
    function, sizes = CALLS[name]
    with jax.enable_x64(True):
        x, members = draw(7, M, K), operands(*sizes)
        found = []
        for given in (members, as_arrays(members)):
            y, pull, dy = pulled(function, x, given)
            found.append(jax.tree.leaves((y, pull(dy))))
    for got, want in zip(*found, strict=True):
        assert got.dtype == want.dtype == np.float64
        assert distance(got, want) <= EXACT


@pytest.mark.parametrize("name", CALLS)
def test_no_dense_copy_is_kept_for_the_backward_pass(name):
    function, sizes = CALLS[name]
    members = operands(*sizes, dtype="float32")
    _, pull, _ = pulled(function, draw(7, M, K).astype(jnp.float32), members)
    kept = {(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(pull)}
    for size in sizes:
        assert (size, "int8") in kept and (size, "float32") not in kept


def test_both_passes_make_the_matrix_in_the_compiled_program_too():
    members = operands((K, N), dtype="float32")
    dy = draw(98, M, N).astype(jnp.float32)

    def both(x, members):
        y, pull, _ = pulled(linear, x, members)
        return y, pull(dy)

    x = draw(7, M, K).astype(jnp.float32)
    text = jax.jit(both).lower(x, members).compile().as_text()
    made = re.findall(rf"= f32\[{K},{N}\]\S* convert\(", text)
    assert len(made) == 2, text


def test_an_array_is_multiplied_by_as_ever():
    members = as_arrays(operands((K, N), dtype="float32"))
    _, pull, dy = pulled(linear, draw(7, M, K).astype(jnp.float32), members)
    names = {equation.primitive.name for equation in equations(jax.make_jaxpr(pull)(dy).jaxpr)}
    assert "optimization_barrier" not in names


@pytest.mark.parametrize("name", CALLS)
def test_the_kernel_is_refused_by_what_the_format_says(name):
    function, sizes = CALLS[name]
    x, members = draw(7, M, K).astype(jnp.bfloat16), operands(*sizes, dtype="bfloat16")
    with on_h200(), pytest.raises(ValueError, match="pallas, but the kernel reads no int8; use"):
        jax.eval_shape(functools.partial(function, kernels="pallas"), x, *members)


def test_what_the_kernel_cannot_read_is_not_chosen_where_it_would_be_faster():
    k = 4096
    x, a, b = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((8192, k), (k, 16), (16, k)))
    array = jax.ShapeDtypeStruct((k, k), jnp.bfloat16)
    kernels: Kernels = "auto"
    with on_h200():
        for w, chosen in ((array, "pallas"), (jax.eval_shape(store, array), "xla")):
            member = LoraWeights(w, a, b)
            assert choice.choose(x, [member], 0.0, kernels, ()) == chosen
