"""`lora_linear` and its groups on interpreted kernels: values and gradients."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_kernels import (
    LoraWeights,
    lora_linear,
    lora_linear_group,
    lora_mlp,
)
from lorax_kernels.lora_linear import fused, reference
from tests.jaxprs import equations
from tests.kernels.interpreter import interpret
from tests.kernels.layers import (
    RATE,
    SCALES,
    bundle,
    check,
    draw,
    draw_members,
    exact_group,
    group,
    single,
    swiglu,
    value_and_gradients,
    weights,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_kernel_at_a_time")]


@pytest.fixture
def inline(monkeypatch):
    """Sets how many columns are made together with the narrow product."""

    def set_width(width):
        monkeypatch.setattr(fused, "inline_width", lambda *sizes: width)

    return set_width


def exact_swiglu(x, members, recompute=False, **options):
    gate, up = exact_group(x, members, **options)
    return [jax.nn.silu(gate) * up]


@pytest.mark.parametrize(
    "shape, k, n, r, dtype",
    [
        ((1,), 128, 128, 1, "bfloat16"),
        ((2, 68), 128, 192, 8, "float16"),
        ((200,), 192, 320, 16, "bfloat16"),
        ((72,), 128, 192, 32, "float16"),
        ((136,), 128, 192, 64, "bfloat16"),
        ((67,), 128, 128, 100, "bfloat16"),
        ((16,), 128, 128, 256, "bfloat16"),
    ],
)
def test_one_layer_s_values_and_gradients(shape, k, n, r, dtype, inline):
    inline(0)
    members = draw_members(k, [(n, r)], dtype, bias=(0,) if r in (1, 16) else ())
    check(single, exact_group, draw(0, *shape, k, dtype=dtype), members)


@pytest.mark.parametrize("r", [16, 32, 64])
def test_one_layer_with_its_narrow_products_inline(r, inline):
    inline(256)
    x, members = draw(0, 136, 320), draw_members(320, [(320, r)], bias=(0,))
    check(single, exact_group, x, members)


@pytest.mark.parametrize(
    "r, rate, width",
    [(16, 0.0, 0), (64, 0.0, 0), (16, 0.0, 256), (64, 0.0, 256), (16, RATE, 0), (None, 0.0, 0)],
)
def test_a_layer_is_added_to_its_residual(r, rate, width, inline):
    inline(width)
    members, x = draw_members(320, [(320, r or 0)], bias=(0,)), draw(0, 2, 68, 320)
    options = {"dropout_rate": rate, "dropout_key": jax.random.key(2)}

    def added(kernels, inputs, members, **options):
        (m,) = members
        m = {"a": None, "b": None, **m}
        options |= {"scale": SCALES[0], "bias": m["bias"], "kernels": kernels}
        return [lora_linear(inputs[0], m["w"], m["a"], m["b"], residual=inputs[1], **options)]

    def exact(inputs, members, **options):
        return [inputs[1] + exact_group(inputs[0], members, **options)[0]]

    inputs = np.stack([x, draw(3, 2, 68, 320)])
    check(added, exact, inputs, members, **options)


@pytest.mark.parametrize("change", [{"dtype": "float32"}, {"n": 192}])
def test_refuses_a_residual_unlike_the_output(change):
    members, x = draw_members(128, [(128, 4)]), draw(0, 16, 128)
    residual = draw(1, 16, change.get("n", 128), dtype=change.get("dtype", "bfloat16"))
    with pytest.raises(ValueError, match=r"the residual must be bfloat16 \(16, 128\), got"):
        single("auto", x, members, residual=residual)


def test_a_group_of_different_ranks_widths_and_biases(inline):
    inline(0)
    x, members = draw(0, 136, 128), draw_members(128, [(256, 16), (128, 0), (192, 7)], bias=(0, 2))
    check(group, exact_group, x, members)


def test_a_group_of_rank_16_is_one_short_step(inline):
    inline(0)
    x, members = draw(0, 24, 128), draw_members(128, [(192, 5), (128, 0), (128, 11)], bias=(1,))
    assert fused.lay_out(bundle(members)).is_short
    check(group, exact_group, x, members)


@pytest.mark.parametrize("width", [0, 256])
def test_a_group_of_rank_32_is_half_a_step_wide(width, inline):
    inline(width)
    x, members = draw(0, 136, 256), draw_members(256, [(320, 16), (128, 0), (192, 16)], bias=(2,))
    layout = fused.lay_out(bundle(members))
    assert layout.size == 32 and not layout.is_short
    assert layout.block(0) == layout.block(1) == (0, 32)
    check(group, exact_group, x, members)


def test_a_group_with_its_narrow_products_inline(inline):
    inline(256)
    sizes = [(320, 16), (128, 0), (192, 40)]
    check(group, exact_group, draw(0, 72, 256), draw_members(256, sizes, bias=(0, 1)))


def test_a_group_without_any_update(inline):
    x, members = draw(0, 40, 128), draw_members(128, [(128, 0), (192, 0)], bias=(1,))
    check(group, exact_group, x, members)


@pytest.mark.parametrize(
    "sizes", [[(192, 16)], [(192, 32)], [(128, 16), (192, 16)], [(128, 40), (128, 100)]]
)
def test_dropout_draws_xla_s_mask_in_both_passes(sizes):
    options = {"dropout_rate": RATE, "dropout_key": jax.random.key(7)}
    function = single if len(sizes) == 1 else group
    check(function, exact_group, draw(0, 72, 128), draw_members(128, sizes), **options)


def test_members_share_one_dropout_and_results_repeat_bit_for_bit():
    x, (member,) = draw(0, 72, 128), draw_members(128, [(128, 16)])
    twin = [LoraWeights(**member)] * 2
    options = {"dropout_rate": RATE, "dropout_key": jax.random.key(3), "kernels": "pallas"}
    with interpret(3) as races:
        runs = [lora_linear_group(x, twin, **options) for _ in range(2)]
        other = options | {"dropout_key": jax.random.key(4)}
        (changed,) = lora_linear_group(x, twin[:1], **other)
        assert not races.found()
    results = {np.asarray(y).tobytes() for run in runs for y in run}
    assert len(results) == 1
    assert np.asarray(changed).tobytes() not in results


@pytest.mark.parametrize(
    "recompute, sizes, rate",
    [
        (False, [(192, 16), (192, 8)], 0.0),
        (True, [(192, 16), (192, 8)], 0.0),
        (True, [(128, 0), (128, 40)], RATE),
        (False, [(128, 0), (128, 0)], 0.0),
    ],
)
def test_swiglu_s_values_and_gradients(recompute, sizes, rate):
    options = {"recompute": recompute, "dropout_rate": rate, "dropout_key": jax.random.key(2)}
    exact = functools.partial(exact_swiglu)
    check(swiglu, exact, draw(0, 72, 128), draw_members(128, sizes), **options)


def test_a_weight_of_another_dtype_takes_the_inputs(inline):
    inline(0)
    x, (m,) = draw(0, 72, 128), draw_members(128, [(128, 16)])
    wide = m | {"w": m["w"].astype(np.float32)}
    with interpret(3):
        got = value_and_gradients(functools.partial(group, "pallas"), x, [wide])
        want = value_and_gradients(functools.partial(group, "pallas"), x, [m])
    jax.tree.map(np.testing.assert_array_equal, got, want)


def count_kernels(jaxpr) -> collections.Counter:
    """Counts the kernels that a function calls, by name."""
    kernels = (e for e in equations(jaxpr) if e.primitive.name == "mpmd_map")
    return collections.Counter(str(kernel.params["name"]) for kernel in kernels)


@pytest.mark.parametrize("policy", [None, "lora_h"])
def test_no_kernel_is_missing_where_layers_are_made_again(policy):
    # The interpreter cannot run under jax.checkpoint, so the kernels are counted.
    shape = lambda *sizes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(sizes, dtype)
    wide = functools.partial(shape, dtype=jnp.float32)
    x, w, a, b = shape(8192, 4096), shape(4096, 4096), wide(4096, 16), wide(16, 4096)

    def layers(x, w, a, b):
        for _ in range(2):
            x = jnp.square(lora_linear(x, w, a, b, scale=1.0, kernels="pallas"))
        return x.astype(jnp.float32).sum()

    saves = policy and jax.checkpoint_policies.save_only_these_names(policy)
    again = jax.checkpoint(layers, policy=saves)
    device = jax.sharding.AbstractDevice("NVIDIA H200", 132, "cuda")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        once, more = (
            count_kernels(jax.make_jaxpr(jax.grad(f, (0, 2, 3)))(x, w, a, b).jaxpr)
            for f in (layers, again)
        )
    begun, rest = "lora_inline_nn", "lora_matmul_nn_store"
    assert once[begun] == once[rest] == 2
    # Both layers' outputs are squared, and what is squared is wanted again.
    assert more - once == {begun: 2, rest: 2}
    assert not once - more


@pytest.mark.parametrize(
    "sizes, rate, repeated",
    [
        ([16, 0, 16], 0.0, False),
        ([0, 0, 5], RATE, False),
        ([8, 8, 40], RATE, False),
        ([100, 200, 16], 0.0, False),  # gate and up in two launches
        ([16, 0, 16], 0.0, True),
        ([16, 16, 24], 0.0, True),
        ([8, 90, 40], RATE, True),
    ],
)
def test_an_mlp_s_values_and_gradients(sizes, rate, repeated, inline):
    inline(0)
    *pair, of_down = sizes
    members = draw_members(128, [(192, r) for r in pair])
    members += draw_members(192, [(128, 0), (128, 0), (128, of_down)], bias=(2,))[2:]
    keys = jax.random.key(2), jax.random.key(3)

    def mlp(kernels, x, members, **options):
        y = lora_mlp(x[0], *weights(members), residual=x[1], kernels=kernels, **options)
        return [y, lora_mlp(x[0], *weights(members), kernels=kernels, **options)][: 1 + apart]

    def exact(inputs, members, dropout_rate, dropout_keys):
        x, residual = inputs
        options = {"dropout_rate": dropout_rate, "dropout_key": dropout_keys[0]}
        (product,) = exact_swiglu(x, members[:2], **options)
        down = members[2]
        options = {"dropout_rate": dropout_rate, "dropout_key": dropout_keys[1]}
        y = product @ down["w"]
        if "a" in down:
            y = reference.lora_linear_reference(
                product, down["w"], down["a"], down["b"], scale=SCALES[2], **options
            )
        y = y + down["bias"][None]
        return [residual + y, y][: 1 + apart]

    apart = sizes == [16, 0, 16] and not repeated  # without a residual, too
    x, options = draw(0, 2, 72, 128), {"dropout_rate": rate, "dropout_keys": keys}
    check(functools.partial(mlp, repeated=repeated), exact, x, members, **options)


def test_an_mlp_that_is_repeated_makes_in_each_pass_what_that_pass_needs():
    shape = lambda *sizes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(sizes, dtype)
    wide = functools.partial(shape, dtype=jnp.float32)
    x, pair, down = shape(8192, 4096), (4096, 14336), (14336, 4096)
    weights = [shape(*pair), shape(*pair), shape(*down)]
    adapters = [(wide(k, 16), wide(16, n)) for k, n in (pair, pair, down)]

    def mlp(repeated, x, adapters, weights):
        members = [LoraWeights(w, *ab, scale=1.0) for w, ab in zip(weights, adapters, strict=True)]
        y = lora_mlp(x, *members, kernels="pallas", repeated=repeated)
        return y.astype(jnp.float32).sum()

    saves = jax.checkpoint_policies.save_only_these_names("lora_h")

    def kernels_of(repeated):
        run = jax.checkpoint(functools.partial(mlp, repeated), policy=saves)
        return count_kernels(jax.make_jaxpr(jax.grad(run, (0, 1)))(x, adapters, weights).jaxpr)

    device = jax.sharding.AbstractDevice("NVIDIA H200", 132, "cuda")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        apart, together = kernels_of(True), kernels_of(False)
    keep, only, store = (f"lora_matmul_nn_{e}" for e in ("swiglu_keep", "swiglu", "store"))
    assert together - apart == {keep: 2, "lora_project": 1}
    assert apart - together == {only: 1, store: 1}


@pytest.mark.parametrize("kernels", ["xla", "pallas"])
def test_an_mlp_keeps_gate_and_up_and_not_their_product(kernels, inline):
    inline(0)
    members = draw_members(128, [(192, 16), (192, 8)]) + draw_members(192, [(128, 4)])
    run = lambda x, m: lora_mlp(x, *m, kernels=kernels)
    kept = lambda: jax.tree.leaves(jax.vjp(run, draw(0, 24, 128), weights(members))[1])
    with interpret(3):
        assert [leaf.shape for leaf in jax.eval_shape(kept)].count((24, 192)) == 2
