"""Operands of the layers, the kernels on them, and the same in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lorax_kernels import (
    LoraWeights,
    lora_linear,
    lora_linear_group,
    lora_swiglu,
)
from lorax_kernels.lora_linear import fused, reference
from tests.kernels.interpreter import interpret

UNIT = {"bfloat16": 3.9e-3, "float16": 4.9e-4}


CEILING = {"bfloat16": 3e-2, "float16": 4e-3}


SCALES = (2.0, 0.5, 1.5)


RATE = 0.3


def draw(seed, *shape, dtype="bfloat16", scale=1.0):
    values = np.random.default_rng(seed).standard_normal(shape) * scale
    return values.astype(jnp.dtype(dtype))


def draw_members(k, sizes, dtype="bfloat16", bias=(), factor=()):
    """Members of (n, r), r 0 without an update; adapters are float32, exact in `dtype`."""
    members = []
    for i, (n, r) in enumerate(sizes):
        member = {"w": draw(10 * i + 1, k, n, dtype=dtype, scale=k**-0.5)}
        if r:
            member["a"] = draw(10 * i + 2, k, r, dtype=dtype, scale=k**-0.5).astype(np.float32)
            member["b"] = draw(10 * i + 3, r, n, dtype=dtype, scale=0.3).astype(np.float32)
        if i in bias:
            member["bias"] = draw(10 * i + 4, n, dtype=dtype)
        if i in factor:
            member["factor"] = np.float32(1 + draw(10 * i + 5, n, dtype="float32", scale=0.3))
        members.append(member)
    return members


def weights(members):
    return [LoraWeights(**m, scale=s) for m, s in zip(members, SCALES, strict=False)]


def group(kernels, x, members, **options):
    return lora_linear_group(x, weights(members), kernels=kernels, **options)


def single(kernels, x, members, **options):
    (m,) = members
    bias = m.get("bias")
    options |= {"scale": SCALES[0], "bias": bias, "kernels": kernels}
    return [lora_linear(x, m["w"], m["a"], m["b"], **options)]


def swiglu(kernels, x, members, **options):
    return [lora_swiglu(x, *weights(members), kernels=kernels, **options)]


def exact_group(x, members, dropout_rate=0.0, dropout_key=None, scales=SCALES):
    rows, outputs = x.reshape(-1, x.shape[-1]), []
    for member, scale in zip(members, scales, strict=False):
        y = rows @ member["w"]
        if "a" in member:
            y = reference.lora_linear_reference(
                rows, member["w"], member["a"], member["b"], scale=scale,
                dropout_rate=dropout_rate, dropout_key=dropout_key,
            )  # fmt: skip
        if "factor" in member:
            y = y * member["factor"][None]
        if "bias" in member:
            y = y + member["bias"][None]
        outputs.append(y.reshape(*x.shape[:-1], -1))
    return outputs


def differentiate(function, x, members):
    """Returns the outputs, dx, and the gradient of all that trains."""
    trains = ("a", "b", "factor")
    adapters = [{name: m[name] for name in trains if name in m} for m in members]

    def run(x, adapters):
        return function(x, [{**m, **own} for m, own in zip(members, adapters, strict=True)])

    outputs, pull = jax.vjp(run, x, adapters)
    cotangents = [draw(90 + i, *y.shape).astype(y.dtype) for i, y in enumerate(outputs)]
    return (outputs, *pull(cotangents))


def value_and_gradients(function, x, members):
    return widened(differentiate(function, x, members))


def widened(tree):
    return jax.tree.map(lambda v: np.asarray(v, np.float64), tree)


def check(function, exact, x, members, **options):
    """Compares the kernels with float64, by what plain XLA loses; returns what they computed."""
    with interpret(3) as races:
        got = value_and_gradients(
            lambda x, members: function("pallas", x, members, **options), x, members
        )
        assert not races.found()
    base = functools.partial(differentiate, lambda x, m: function("xla", x, m, **options))
    with jax.numpy_rank_promotion("allow"):
        plain = widened(jax.jit(base)(x, members))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), (x, members))
        right = functools.partial(differentiate, functools.partial(exact, **options))
        want = widened(jax.jit(right)(*wide))
    unit, ceiling = UNIT[str(x.dtype)], CEILING[str(x.dtype)]
    trees = [jax.tree.leaves_with_path(tree) for tree in (got, plain, want)]
    for (path, ours), (_, theirs), (_, right) in zip(*trees, strict=True):
        relative = lambda v, right=right: np.linalg.norm(v - right) / np.linalg.norm(right)
        bound = min(2 * relative(theirs) + 4 * unit, ceiling)
        assert relative(ours) <= bound, jax.tree_util.keystr(path)
    return got


def bundle(members):
    return fused.Group.of(weights(members), 0.0, None, "pallas")
