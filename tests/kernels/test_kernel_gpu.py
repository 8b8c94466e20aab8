"""The fused kernels on a Hopper GPU: values at real sizes, repeats, and whole training runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lorax.adapters.nnx.apply import apply_lora, set_kernels
from lorax.config.adapter import LoraConfig
from lorax.devices.determinism import compiler_options
from lorax.layers.documents import DocumentLayout
from lorax.models.decoder import CausalLM
from lorax.models.families import read_architecture
from lorax.models.stack.recompute import save_lora_h
from lorax.training.step import make_train_step
from lorax_kernels import (
    LoraWeights,
    lora_linear,
    lora_linear_group,
    lora_mlp,
    lora_swiglu,
    rms_norm_fork,
    token_nll_and_gradient,
)
from lorax_kernels.device import runs_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        jax.default_backend() != "gpu" or not runs_kernels(), reason="needs a Hopper GPU"
    ),
]
UNIT = {"bfloat16": 3.9e-3, "float16": 4.9e-4}
CEILING = {"bfloat16": 2e-2, "float16": 4e-3}


def draw(seed, shape, deviation, dtype):
    values = jax.random.normal(jax.random.key(seed), shape, jnp.float32) * deviation
    return values.astype(dtype)


def operands(m, k, ns, ranks, dtype):
    x = draw(0, (m, k), 1.0, dtype)
    w = [draw(10 + i, (k, n), k**-0.5, dtype) for i, n in enumerate(ns)]
    adapters = [
        None
        if r is None
        else (draw(20 + i, (k, r), k**-0.5, jnp.float32), draw(30 + i, (r, n), 0.3, jnp.float32))
        for i, (r, n) in enumerate(zip(ranks, ns, strict=True))
    ]
    return x, w, adapters, [draw(40 + i, (m, n), 1.0, dtype) for i, n in enumerate(ns)]


def run(x, w, adapters, dys, **options):
    def function(x, adapters):
        members = [
            LoraWeights(w, scale=2.0) if ab is None else LoraWeights(w, *ab, scale=2.0)
            for w, ab in zip(w, adapters, strict=True)
        ]
        return lora_linear_group(x, members, **options)

    y, pull = jax.vjp(function, x, adapters)
    return y, pull(dys)


def distance(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "m, k, ns, ranks",
    [
        (8192, 4096, (4096,), (16,)),
        (8192, 4096, (4096, 1024, 1024), (16, None, 8)),
        (8192, 4096, (4096, 1024), (16, 16)),
        (1000, 2048, (2048,), (32,)),
        (2056, 2048, (2048,), (1,)),
        (1000, 4096, (1024, 256), (64, 100)),
        (16, 128, (128,), (256,)),
    ],
)
def test_values_and_gradients_at_real_sizes_follow_rule_k(m, k, ns, ranks, dtype):
    inputs = operands(m, k, ns, ranks, dtype)
    got = jax.jit(lambda *a: run(*a, kernels="pallas"))(*inputs)
    base = jax.jit(lambda *a: run(*a, kernels="xla"))(*inputs)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), inputs)
    with jax.default_matmul_precision("highest"):
        want = jax.jit(lambda *a: run(*a, kernels="xla"))(*wide)
    for ours, theirs, exact in zip(*map(jax.tree.leaves, (got, base, want)), strict=True):
        bound = 2 * distance(theirs, exact) + 4 * UNIT[dtype]
        assert distance(ours, exact) <= min(bound, CEILING[dtype])


@pytest.mark.parametrize("recompute", [False, True])
def test_swiglu_at_a_real_size(recompute):
    x, w, adapters, dys = operands(4096, 2048, (8192, 8192), (16, 16), "bfloat16")

    def results(kernels, x, w, adapters, dy):
        def function(x, adapters):
            gate, up = (LoraWeights(w, *ab, scale=2.0) for w, ab in zip(w, adapters, strict=True))
            return lora_swiglu(x, gate, up, kernels=kernels, recompute=recompute)

        y, pull = jax.vjp(function, x, adapters)
        return y, pull(dy)

    compare(results, x, w, adapters, dys[0], bound=1.5e-2)


@pytest.mark.parametrize("rate, repeated", [(0.0, False), (0.1, False), (0.0, True), (0.1, True)])
def test_an_mlp_at_a_real_size(rate, repeated):
    x, w, adapters, _ = operands(4096, 2048, (8192, 8192), (16, 16), "bfloat16")
    inner, w_down, down, dys = operands(4096, 8192, (2048,), (16,), "bfloat16")
    del inner
    keys = jax.random.key(3), jax.random.key(4)

    def results(kernels, x, residual, w, adapters, dy):
        def mlp(x, residual, adapters):
            members = [LoraWeights(v, *ab, scale=2.0) for v, ab in zip(w, adapters, strict=True)]
            options = {"dropout_rate": rate, "dropout_keys": keys, "repeated": repeated}
            return lora_mlp(x, *members, residual=residual, kernels=kernels, **options)

        if repeated:
            mlp = jax.checkpoint(mlp, policy=save_lora_h)
        y, pull = jax.vjp(mlp, x, residual, adapters)
        return y, pull(dy)

    residual = draw(50, x.shape, 1.0, x.dtype)
    compare(results, x, residual, [*w, *w_down], [*adapters, *down], dys[0], bound=1.5e-2)


@pytest.mark.parametrize("k, n, r", [(4096, 4096, 16), (14336, 4096, 16), (4096, 4096, 64)])
def test_a_layer_is_added_to_its_residual(k, n, r):
    x, (w,), [ab], (dy,) = operands(8192, k, (n,), (r,), "bfloat16")

    def results(kernels, x, w, ab, residual, dy):
        def added(x, ab, residual):
            return lora_linear(x, w, *ab, scale=2.0, residual=residual, kernels=kernels)

        y, pull = jax.vjp(added, x, ab, residual)
        return y, pull(dy)

    compare(results, x, w, ab, draw(50, (8192, n), 1.0, "bfloat16"), dy, bound=1e-2)


def compare(results, *operands, bound):
    """Holds the kernels to what XLA makes of the same operands.

    They are arguments, not constants of the program: those XLA would multiply while it compiles.
    """
    got, want = (jax.jit(functools.partial(results, k))(*operands) for k in ("pallas", "xla"))
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert distance(ours, theirs) <= bound


@pytest.mark.parametrize("d", [2048, 3584, 5120])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_norm_s_backward_pass_at_a_real_size(d, dtype):
    x, dx, dy = (draw(i, (4, 1000, d), 1.0, dtype) for i in range(3))
    weight = draw(3, (d,), 1.0, dtype)

    def pulled(kernels, *operands):
        fork = lambda x: rms_norm_fork(x, operands[0], 1e-5, kernels=kernels)
        return jax.vjp(fork, operands[1])[1](operands[2:])[0]

    got, base = (jax.jit(functools.partial(pulled, k))(weight, x, dx, dy) for k in ("auto", "xla"))
    want = pulled("xla", *(array.astype(jnp.float32) for array in (weight, x, dx, dy)))
    assert distance(got, want) <= distance(base, want) <= UNIT[dtype]


@pytest.mark.parametrize("v", [32000, 128256, 151936, 262144])
@pytest.mark.parametrize("options", [{}, {"soft_cap": 30.0, "z_loss": 1e-4}])
def test_cross_entropy_at_a_real_size(v, options):
    logits, labels = draw(0, (4, 75, v), 3.0, "bfloat16"), jnp.arange(300).reshape(4, 75) * 97
    labels = labels.at[1, 3].set(-100)
    call = lambda kernels, x: token_nll_and_gradient(x, labels, kernels=kernels, **options)
    nll, got = jax.jit(functools.partial(call, "auto"))(logits)
    _, base = jax.jit(functools.partial(call, "xla"))(logits)
    want_nll, want = jax.jit(functools.partial(call, "xla"))(logits.astype(jnp.float32))
    assert jnp.abs(nll - want_nll).max() <= 1e-4
    assert distance(got, want) <= 1.01 * distance(base, want) <= UNIT["bfloat16"]


def test_a_hundred_repeats_are_equal_bit_for_bit():
    inputs = operands(4096, 2048, (2048, 512, 512), (16, 16, 16), "bfloat16")
    options = {"kernels": "pallas", "dropout_rate": 0.1, "dropout_key": jax.random.key(3)}
    for extra in ({}, options):
        call = jax.jit(lambda *a, extra=extra: run(*a, **{"kernels": "pallas", **extra}))
        first = jax.tree.leaves(call(*inputs))
        same = jax.jit(lambda p, q: jnp.stack([(u == v).all() for u, v in zip(p, q, strict=True)]))
        for _ in range(100):
            assert same(first, jax.tree.leaves(call(*inputs))).all()


@pytest.mark.parametrize("r", [16, 32])
def test_dropout_is_the_same_on_both_paths(r):
    inputs = operands(4096, 2048, (2048,), (r,), "bfloat16")
    options = {"dropout_rate": 0.1, "dropout_key": jax.random.key(3)}
    ours = jax.jit(lambda *a: run(*a, kernels="pallas", **options))(*inputs)
    theirs = jax.jit(lambda *a: run(*a, kernels="xla", **options))(*inputs)
    for p, q in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert distance(p, q) <= 1e-2


def make_model(dtype, layers: int = 2) -> CausalLM:
    """Returns a small Llama with adapters."""
    config = read_architecture(
        {
            "model_type": "llama",
            "hidden_size": 512,
            "intermediate_size": 1024,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 512,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
        },
        "test",
    )
    model = CausalLM(config, dtype=dtype, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    return apply_lora(model, LoraConfig(r=16), rngs=nnx.Rngs(1))


def draw_batch(rows: int, length: int) -> dict[str, np.ndarray]:
    """Returns one micro-batch of random tokens."""
    tokens = np.random.default_rng(0).integers(0, 512, (1, rows, length + 1)).astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (1, rows, length))
    return {"input_ids": tokens[..., :-1], "labels": tokens[..., 1:], "positions": positions}


def train(kernels: str, dtype=jnp.bfloat16, options: dict | None = None, steps: int = 50):
    """Returns the losses and the adapters of a small model after some steps."""
    model, batch = make_model(dtype), draw_batch(16, 256)
    set_kernels(model, kernels)
    step, state = make_train_step(model, optax.sgd(0.5))
    lowered = step.compiled.lower(state, step.frozen, batch)
    step = dataclasses.replace(step, compiled=lowered.compile(compiler_options=options))
    losses = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    flat = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(state.trainable)]
    return np.array(losses), np.concatenate(flat)


def test_the_trained_result_does_not_depend_on_the_path():
    exact_losses, exact = train("xla", jnp.float32)
    losses, adapters = train("xla")
    # The same sums in another order: products through Triton instead of cuBLAS.
    _, other = train("xla", options={"xla_gpu_enable_triton_gemm": True})
    our_losses, ours = train("pallas")
    found = {
        "two orders of xla": distance(other, adapters),
        "pallas and xla": distance(ours, adapters),
        "pallas and float32": distance(ours, exact),
        "xla and float32": distance(adapters, exact),
    }
    print(found)
    assert exact_losses[-1] < exact_losses[0] - 0.1
    assert 0 < found["two orders of xla"] < found["xla and float32"]
    assert found["pallas and xla"] < found["xla and float32"]
    assert found["pallas and float32"] <= 1.25 * found["xla and float32"]
    assert np.abs(our_losses - exact_losses).max() <= 1.5 * np.abs(losses - exact_losses).max()


@pytest.mark.parametrize("packed", ["", "by document", "by mask"])
@pytest.mark.parametrize("policy", ["none", "full", "offload"])
def test_a_step_of_full_determinism_repeats_bit_by_bit(policy, packed):
    # Layers whose attention is equal: XLA finds a program for all of them only if all are marked.
    model, batch = make_model(jnp.bfloat16, layers=3), draw_batch(8, 2048)
    model.gradient_checkpointing = policy
    if packed == "by document":
        model.document_layout = DocumentLayout(1024, 2)
    if packed:
        lengths = [(700, 1000, 300), (900, 1000, 0)]  # the rest is padding
        segments = np.zeros((1, 8, 2048), np.int32)
        for row in range(8):
            segments[0, row, : sum(lengths[row % 2])] = np.repeat([1, 2, 3], lengths[row % 2])
        batch["segment_ids"] = segments
    usual, start = make_train_step(model, optax.sgd(0.5))
    expected, told = usual(jax.tree.map(jnp.copy, start), batch)
    results, state, metrics = set(), start, dict[str, jax.Array]()
    for _ in range(2):  # two programs, which XLA might make differently
        step, start = make_train_step(model, optax.sgd(0.5), full_determinism=True)
        step = step.compile(start, batch)
        for turn in range(20):
            # What was in memory before must not matter.
            jnp.full((2**30,), (jnp.nan, 1e30, 0.0)[turn % 3]).block_until_ready().delete()
            state, metrics = step(jax.tree.map(jnp.copy, start), batch)
            leaves = jax.tree.leaves(jax.device_get(state.trainable))
            results.add(b"".join(leaf.tobytes() for leaf in leaves))
    assert len(results) == 1
    assert metrics["applied"] and abs(metrics["loss"] - told["loss"]) < 1e-4
    move = lambda state: jax.tree.map(jnp.subtract, state.trainable, start.trainable)
    ours, theirs = (
        np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(move(s))])
        for s in (state, expected)
    )
    assert distance(ours, theirs) < 0.01


@pytest.mark.parametrize("outside", [False, True])
def test_rows_are_added_up_as_they_should_be_where_what_does_not_repeat_is_left_out(outside):
    # The gradient of an embedding; and one whose indices lie outside, which are to be dropped.
    ids = np.random.default_rng(0).integers(0, 97, (4, 512))
    ids[:, ::3] = 97 if outside else 5
    x = np.random.default_rng(1).integers(-8, 8, (4, 512, 64)).astype(np.float32)
    expected = np.zeros((98, 64), np.float32)
    np.add.at(expected, ids, x)
    add = lambda x, ids: jnp.zeros((97, 64)).at[ids].add(x, mode="drop")
    found = jax.jit(add, compiler_options=compiler_options(True))(x, ids)
    np.testing.assert_array_equal(found, expected[:97])


@pytest.mark.parametrize("policy", [None, "lora_h"])
def test_layers_made_again_in_the_backward_pass_have_the_same_gradients(policy):
    x, (w,), (ab,), (dy,) = operands(8192, 4096, (4096,), (16,), "bfloat16")

    def layers(x, ab):
        for _ in range(2):
            x = jnp.square(lora_linear_group(x, [LoraWeights(w, *ab)], kernels="pallas")[0])
        return x

    def gradients(function):
        return jax.jit(lambda: jax.vjp(function, x, ab)[1](dy))()

    saves = policy and jax.checkpoint_policies.save_only_these_names(policy)
    want, got = gradients(layers), gradients(jax.checkpoint(layers, policy=saves))
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_biases_at_a_real_size_are_added_before_the_rounding(rate):
    x, w, adapters, _ = operands(8192, 4096, (4096, 1024), (16, 8), "bfloat16")
    biases = [draw(50 + i, (v.shape[1],), 1.0, "bfloat16") for i, v in enumerate(w)]
    members = [
        LoraWeights(v, *ab, bias, scale=2.0)
        for v, ab, bias in zip(w, adapters, biases, strict=True)
    ]
    options = {"dropout_rate": rate, "dropout_key": jax.random.key(3)}
    call = lambda kernels: jax.jit(
        lambda: lora_linear_group(x, members, kernels=kernels, **options)
    )
    for ours, theirs in zip(call("pallas")(), call("xla")(), strict=True):
        assert distance(ours, theirs) <= 4 * UNIT["bfloat16"]
