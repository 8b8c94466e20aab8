"""`lora_linear` and its groups on interpreted kernels: values, gradients, refusals, and choices."""

import collections
import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax.devices.mesh import DATA_AXIS, make_mesh
from lorax_kernels import (
    LoraWeights,
    lora_linear,
    lora_linear_group,
    lora_mlp,
    lora_swiglu,
    tuning,
)
from lorax_kernels.device import interpreted
from lorax_kernels.lora_linear import calls, choice, fused, project, reference
from lorax_kernels.lora_linear import gradient as gradient_module
from lorax_kernels.lora_linear.choice import padded_rank
from lorax_kernels.lora_linear.dropout import keep_mask, keep_probability, random_bits, seed_words
from lorax_kernels.lora_linear.plan import SHARED_MEMORY_BYTES, Dropout, MatmulConfig
from lorax_kernels.testing import interpret
from tests.jaxprs import equations

pytestmark = pytest.mark.slow

UNIT = {"bfloat16": 3.9e-3, "float16": 4.9e-4}
CEILING = {"bfloat16": 3e-2, "float16": 4e-3}
SCALES = (2.0, 0.5, 1.5)
RATE = 0.3


@pytest.fixture(autouse=True)
def one_kernel_at_a_time(monkeypatch):
    # Interpreted kernels of one compiled function would run side by side, and wait for each other.
    for name, value in list(vars(calls).items()):
        if hasattr(value, "lower") and hasattr(value, "__wrapped__"):
            monkeypatch.setattr(calls, name, value.__wrapped__)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    yield
    jax.config.update("jax_cpu_enable_async_dispatch", True)


@pytest.fixture
def inline(monkeypatch):
    """Sets how many columns are made together with the narrow product."""

    def set_width(width):
        monkeypatch.setattr(fused, "inline_width", lambda *sizes: width)

    return set_width


def draw(seed, *shape, dtype="bfloat16", scale=1.0):
    values = np.random.default_rng(seed).standard_normal(shape) * scale
    return values.astype(jnp.dtype(dtype))


def draw_members(k, sizes, dtype="bfloat16", bias=()):
    """Members of (n, r), r 0 without an update; adapters are float32, exact in `dtype`."""
    members = []
    for i, (n, r) in enumerate(sizes):
        member = {"w": draw(10 * i + 1, k, n, dtype=dtype, scale=k**-0.5)}
        if r:
            member["a"] = draw(10 * i + 2, k, r, dtype=dtype, scale=k**-0.5).astype(np.float32)
            member["b"] = draw(10 * i + 3, r, n, dtype=dtype, scale=0.3).astype(np.float32)
        if i in bias:
            member["bias"] = draw(10 * i + 4, n, dtype=dtype)
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


def exact_group(x, members, dropout_rate=0.0, dropout_key=None):
    rows, outputs = x.reshape(-1, x.shape[-1]), []
    for member, scale in zip(members, SCALES, strict=False):
        y = rows @ member["w"]
        if "a" in member:
            y = reference.lora_linear_reference(
                rows, member["w"], member["a"], member["b"], scale=scale,
                dropout_rate=dropout_rate, dropout_key=dropout_key,
            )  # fmt: skip
        if "bias" in member:
            y = y + member["bias"][None]
        outputs.append(y.reshape(*x.shape[:-1], -1))
    return outputs


def exact_swiglu(x, members, recompute=False, **options):
    gate, up = exact_group(x, members, **options)
    return [jax.nn.silu(gate) * up]


def value_and_gradients(function, x, members):
    """Returns the outputs, dx, and every da and db."""
    adapters = [{name: m[name] for name in ("a", "b") if name in m} for m in members]

    def run(x, adapters):
        return function(x, [{**m, **own} for m, own in zip(members, adapters, strict=True)])

    outputs, pull = jax.vjp(run, x, adapters)
    cotangents = [draw(90 + i, *y.shape).astype(y.dtype) for i, y in enumerate(outputs)]
    return jax.tree.map(lambda v: np.asarray(v, np.float64), (outputs, *pull(cotangents)))


def check(function, exact, x, members, **options):
    """Compares the kernels with float64, by what plain XLA loses; returns what they computed."""
    with interpret(3) as races:
        got = value_and_gradients(
            lambda x, members: function("pallas", x, members, **options), x, members
        )
        assert not races.found()
    base = jax.jit(lambda x, m: function("xla", x, m, **options))
    with jax.numpy_rank_promotion("allow"):
        plain = value_and_gradients(base, x, members)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), (x, members))
        want = value_and_gradients(jax.jit(functools.partial(exact, **options)), *wide)
    unit, ceiling = UNIT[str(x.dtype)], CEILING[str(x.dtype)]
    trees = [jax.tree.leaves_with_path(tree) for tree in (got, plain, want)]
    for (path, ours), (_, theirs), (_, right) in zip(*trees, strict=True):
        relative = lambda v, right=right: np.linalg.norm(v - right) / np.linalg.norm(right)
        bound = min(2 * relative(theirs) + 4 * unit, ceiling)
        assert relative(ours) <= bound, jax.tree_util.keystr(path)
    return got


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


def bundle(members):
    return fused.Group.of(weights(members), 0.0, None, "pallas")


def test_a_group_of_too_many_ranks_is_launched_in_parts(monkeypatch):
    x, members = draw(0, 16, 128), draw_members(128, [(128, 200), (128, 100)])
    assert choice.split(weights(members)) == [[0], [1]]
    sizes = [(128, 64), (128, 100), (128, 64), (128, 1)]
    assert choice.split([LoraWeights(**m) for m in draw_members(128, sizes)]) == [[0, 1, 2], [3]]
    launched = []
    forward = fused.forward

    def count(x, group, *options):
        launched.append(len(group.w))
        return forward(x, group, *options)

    monkeypatch.setattr(fused, "forward", count)
    check(group, exact_group, x, members)
    assert launched == [1, 1]
    with interpret(3) as races:
        (act,) = swiglu("pallas", x, members)
        assert not races.found()
    assert launched == [1, 1, 1, 1]
    (base,) = swiglu("xla", x, members)
    assert np.linalg.norm(np.float64(act) - np.float64(base)) < 0.02 * np.linalg.norm(base)


def test_ranks_are_padded_to_16_to_32_or_to_whole_steps():
    ranks = {1: 16, 16: 16, 17: 32, 32: 32, 33: 64, 64: 64, 65: 128, 129: 192}
    assert {r: padded_rank(r) for r in ranks} == ranks


def test_blocks_of_a_layout_hold_their_updates_whole():
    for ranks in itertools.product((1, 8, 16, 40, 64, 100), repeat=3):
        layout = fused.lay_out(bundle(draw_members(64, [(8, r) for r in ranks])))
        ends = [start + r for start, r in zip(layout.starts, ranks, strict=True)]
        assert all(e <= s for e, s in zip(ends, layout.starts[1:], strict=False))
        assert ends[-1] <= layout.size == padded_rank(ends[-1])
        for index, (start, end) in enumerate(zip(layout.starts, ends, strict=True)):
            first, rows = layout.block(index)
            assert first <= start and end <= first + rows <= layout.size
            assert first % 64 == 0


@pytest.mark.parametrize(
    "dtype, k, n, r, m, message",
    [
        ("float32", 128, 128, 8, 16, "the kernel takes bfloat16 and float16, got float32"),
        ("bfloat16", 96, 128, 8, 16, "k must be a multiple of 64 and at least 128, got 96"),
        ("bfloat16", 128, 64, 8, 16, "n must be a multiple of 64 and at least 128, got 64"),
        ("bfloat16", 128, 128, 300, 16, "the rank must be at most 256, got 300"),
        ("bfloat16", 128, 128, 8, 0, "there are no rows"),
    ],
)
def test_refuses_sizes_that_the_kernel_does_not_take(dtype, k, n, r, m, message):
    x, members = draw(0, m, k, dtype=dtype), draw_members(k, [(n, r)], dtype)
    with interpreted(3), pytest.raises(ValueError) as error:
        single("pallas", x, members)
    assert str(error.value) == f"kernels is pallas, but {message}; use auto or xla"
    with interpreted(3):
        assert jax.eval_shape(lambda x: single("auto", x, members)[0], x).shape == (m, n)


def test_refuses_a_device_without_the_matrix_units_and_a_name_it_does_not_know():
    x, members = draw(0, 16, 128), draw_members(128, [(128, 8)])
    with pytest.raises(
        ValueError, match=r"needs a Hopper GPU \(H100, H200\), and this is cpu; use"
    ):
        single("pallas", x, members)
    with pytest.raises(ValueError, match="kernels must be auto, pallas or xla, got 'triton'"):
        single("triton", x, members)


def test_auto_runs_xla_where_nothing_was_measured():
    x, members = draw(0, 16, 128), draw_members(128, [(128, 8)])
    plain = str(jax.make_jaxpr(lambda x: single("xla", x, members))(x))
    for cores in (0, 3):
        with interpreted(cores):
            assert str(jax.make_jaxpr(lambda x: single("auto", x, members))(x)) == plain
    np.testing.assert_array_equal(*(single(kernels, x, members)[0] for kernels in ("auto", "xla")))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bias_in_xla_needs_no_rank_promotion(dtype):
    x, members = draw(0, 16, 128, dtype=dtype), draw_members(128, [(128, 8)], dtype, bias=(0,))
    (with_bias,), bias = single("xla", x, members), members[0].pop("bias")
    (without,) = single("xla", x, members)
    np.testing.assert_allclose(
        np.float32(with_bias), np.float32(without) + np.float32(bias), rtol=0.02, atol=0.05
    )


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes a table for a made-up device and pretends to run on it."""

    def write(fields):
        (tmp_path / "nvidia_h300.json").write_text(json.dumps(fields))

    monkeypatch.setattr(tuning, "TUNED", tmp_path)
    monkeypatch.setattr(tuning, "device_kind", lambda: "NVIDIA H300")
    return write


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"matmul": []}',
        '{"matmul": [{"m": 1}], "linear": []}',
        '{"alike": "NVIDIA H100", "matmul": [], "linear": []}',
        '{"matmul": [{"config": {"block_q": 1}}], "linear": []}',
    ],
)
def test_a_broken_table_is_named(text, tmp_path):
    path = tmp_path / "nvidia_h200.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"nvidia_h200\.json is not a table of tuned kernels"):
        tuning.load_table(path)


def test_the_nearest_measured_product_gives_the_tiles(table):
    row = lambda m, k, n, stages, **more: {
        **{"transposed": False, "epilogue": "store", "m": m, "k": k, "n": n},
        **{"config": {"stages": stages}},
        **more,
    }
    near, far = row(8192, 4096, 4096, 3), row(512, 4096, 4096, 2)
    turned = row(8192, 4096, 4096, 1, transposed=True)
    gated = row(8192, 4096, 4096, 4, epilogue="swiglu", config={"stages": 4, "block_n": 128})
    table({"matmul": [far, near, turned, gated], "linear": []})
    assert tuning.matmul_config(7000, 4096, 4096, transposed=False) == MatmulConfig(stages=3)
    assert tuning.matmul_config(600, 4096, 4096, transposed=False) == MatmulConfig(stages=2)
    assert tuning.matmul_config(600, 4096, 4096, transposed=True) == MatmulConfig(stages=1)
    config = tuning.matmul_config(600, 64, 64, transposed=False, epilogue="swiglu")
    assert config == MatmulConfig(stages=4, block_n=128)
    keep = functools.partial(
        tuning.matmul_config, 600, 64, 64, transposed=False, epilogue="swiglu_keep"
    )
    assert keep() == MatmulConfig()
    # A short step takes the room of a slot, where there is no other.
    assert keep(short=True) == MatmulConfig(stages=3)
    config = tuning.matmul_config(1, 1, 1, transposed=False, epilogue="swiglu", short=True)
    assert config == MatmulConfig(stages=4, block_n=128)


def test_the_kernel_runs_where_the_nearest_measurement_was_faster(table):
    row = lambda m, r, ours, xla: {
        **{"m": m, "k": 4096, "n": 4096, "r": r},
        **{"ours_us": ours, "xla_us": xla},
    }
    rows = [row(8192, 16, 9.0, 10.0), row(8192, 64, 11.0, 10.0), row(1024, 16, 12.0, 10.0)]
    table({"matmul": [], "linear": rows})
    assert tuning.is_faster(8192, 4096, 4096, 16)
    assert tuning.is_faster(5000, 4096, 4096, 16)
    assert not tuning.is_faster(8192, 4096, 4096, 64)
    assert not tuning.is_faster(1024, 4096, 4096, 16)
    assert not tuning.is_faster(3000, 4096, 4096, 16)  # a factor of two from everything
    assert tuning.is_faster(131072, 4096, 4096, 16)  # more rows than any
    assert not tuning.is_faster(131072, 4096, 4096, 64)
    assert not tuning.is_faster(8192, 4096, 16384, 16)


@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize(
    "ranks", [(1,), (16,), (32,), (64,), (192,), (256,), (16, 16), (16, 16, 16), (64, 64, 100)]
)
def test_every_rank_has_tiles_on_the_h200(ranks, rate, monkeypatch):
    monkeypatch.setattr(tuning, "device_kind", lambda: "NVIDIA H200")
    members = draw_members(256, [(256, r) for r in ranks])
    options = {"dropout_rate": rate, "dropout_key": jax.random.key(0)}
    function = lambda x, members: group("pallas", x, members, **options)
    x = draw(0, 256, 256)
    if rate and max(ranks) > 192:
        with interpreted(132), pytest.raises(ValueError, match=r"with dropout the rank .* 192"):
            function(x, members)
        return
    with interpreted(132):
        shapes = jax.eval_shape(lambda: jax.vjp(function, x, members)[1]([x] * len(ranks)))
    assert shapes[0].shape == x.shape


def test_a_table_stands_for_devices_alike_that_have_none(table, monkeypatch, tmp_path):
    row = {"m": 8192, "k": 4096, "n": 4096, "r": 16, "ours_us": 9.0, "xla_us": 10.0}
    table({"alike": ["NVIDIA H299"], "matmul": [], "linear": [row]})
    monkeypatch.setattr(tuning, "device_kind", lambda: "NVIDIA H299")
    assert tuning.is_faster(8192, 4096, 4096, 16)
    slower = {"matmul": [], "linear": [row | {"ours_us": 11.0}]}  # its own goes first
    (tmp_path / "nvidia_h299.json").write_text(json.dumps(slower))
    assert not tuning.is_faster(8192, 4096, 4096, 16)
    monkeypatch.setattr(tuning, "device_kind", lambda: "NVIDIA H298")
    assert not tuning.is_faster(8192, 4096, 4096, 16)


def test_without_a_table_the_defaults_stand(table):
    assert tuning.matmul_config(8192, 4096, 4096, transposed=False) == MatmulConfig()
    assert not tuning.is_faster(8192, 4096, 4096, 16)


def test_the_columns_made_inline_are_whole_tiles_of_the_first_member():
    sizes = itertools.product((16, 1000, 8192, 16384), (1024, 4096, 14336), (64, 128, 512, 4096))
    widths = []
    for m, k, n0 in sizes:
        for n, r in itertools.product((n0, 3 * n0), (16, 32, 64, 128)):
            width = tuning.inline_width(m, k, n, n0, r, sms=132)
            assert width % tuning.inline_config(r).block_n == 0 and 0 <= width <= n0
            assert r < 128 or width == 0
            widths.append(width)
    assert 0 < np.count_nonzero(widths) < len(widths)


def test_skinny_passes_fit_shared_memory(monkeypatch):
    needed = []

    def record(body, name, outputs, scratch, sms):
        fields = [ref for ref in scratch.values() if hasattr(ref, "dtype")]
        assert len(fields) >= 3
        needed.append(sum(math.prod(f.shape) * jnp.dtype(f.dtype).itemsize for f in fields))
        return lambda *operands: [None]

    monkeypatch.setattr(project, "launch", record)
    monkeypatch.setattr(gradient_module, "launch", record)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    rows, columns = (1, 2048, 8192, 16384), (1024, 4096, 14336, 28672)
    for m, c, r in itertools.product(rows, columns, (16, 32, 64, 128, 192, 256)):
        config = tuning.project_config(m, c, r, sms=132)
        assert config.stages >= 2 and config.boxes % 2 == 0 and config.block_c % 64 == 0
        project.project(shape((m, c)), shape((r, c)), config=config)
        for u in (0, 16):
            config = tuning.gradient_config(m, c, r, u, sms=132)
            assert config.stages >= 2 and config.block_c % 128 == 0
            assert 1 <= config.row_blocks <= -(-m // 128)
            given = shape((u, c)) if u else None
            gradient_module.gradient(shape((m, c)), shape((m, r)), given, config=config)
    assert len(needed) == 4 * 4 * 6 * 3
    assert max(needed) <= SHARED_MEMORY_BYTES - 1024  # a little is left for barriers


def draw_mask(key, rate, m=1024, k=1024, row0=0):
    seed = seed_words(key)
    row = jax.lax.broadcasted_iota(jnp.uint32, (m, k), 0)
    column = jax.lax.broadcasted_iota(jnp.uint32, (m, k), 1)
    return np.asarray(keep_mask(seed[0], seed[1], jnp.uint32(row0), row, column, rate))


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("key", [0, 1])
def test_a_mask_keeps_the_right_share_and_is_uncorrelated(rate, key):
    mask, keep = draw_mask(jax.random.key(key), rate), keep_probability(rate)
    assert abs(keep - (1.0 - rate)) <= 2.0**-17
    sigma = (keep * (1.0 - keep) / mask.size) ** 0.5
    assert abs(mask.mean() - keep) < 5 * sigma
    noise = mask.astype(np.float64) - keep
    variance = keep * (1.0 - keep)
    shifts = [(1, 0), (0, 1), (1, 1), (2, 0), (8, 0), (16, 0), (0, 8), (0, 64), (64, 0), (128, 256)]
    for i, j in shifts:
        pairs = noise[i:, j:] * noise[: noise.shape[0] - i, : noise.shape[1] - j]
        assert abs(pairs.mean()) / variance < 5 / pairs.size**0.5, (i, j)
    for axis in (0, 1):  # no row and no column is unlike the others
        means = mask.mean(axis) - keep
        assert np.abs(means).max() < 6 * (variance / mask.shape[axis]) ** 0.5


@pytest.mark.parametrize("kind", ["split", "numbered"])
def test_two_keys_give_independent_masks(kind):
    keep = keep_probability(0.3)
    keys = jax.random.split(jax.random.key(0), 4)
    if kind == "numbered":
        keys = [jax.random.key(i) for i in range(4)]
    masks = [draw_mask(key, 0.3) for key in keys]
    expected = keep**2 + (1.0 - keep) ** 2
    for one, other in itertools.combinations(masks, 2):
        sigma = (expected * (1.0 - expected) / one.size) ** 0.5
        assert abs((one == other).mean() - expected) < 5 * sigma


def test_a_mask_of_later_rows_is_a_part_of_the_whole():
    key = jax.random.key(5)
    whole = draw_mask(key, 0.3, 256, 64)
    for row0 in (16, 48, 128):
        np.testing.assert_array_equal(draw_mask(key, 0.3, 64, 64, row0), whole[row0 : row0 + 64])


def test_random_bits_fill_every_byte_evenly():
    seed = seed_words(jax.random.key(11))
    row = jax.lax.broadcasted_iota(jnp.uint32, (512, 1024), 0)
    column = jax.lax.broadcasted_iota(jnp.uint32, (512, 1024), 1)
    draws = np.asarray(random_bits(seed[0], seed[1], row, column)).view(np.uint8).reshape(-1, 4)
    for byte in range(4):
        counts = np.bincount(draws[:, byte], minlength=256)
        expected = len(draws) / 256
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi_square - 255) < 5 * (2 * 255) ** 0.5, byte


def test_kernels_number_rows_from_the_shard_s_first():
    x, a = draw(0, 64, 128), draw(1, 16, 128, scale=0.1)
    words = seed_words(jax.random.key(7))
    seed = lambda row: jnp.concatenate([words, jnp.array([row], jnp.uint32)])
    with interpret(3):
        whole = fused.down_project(x, a, Dropout(seed(0), RATE))
        later = fused.down_project(x[32:], a, Dropout(seed(32), RATE))
    np.testing.assert_array_equal(np.asarray(whole)[32:], np.asarray(later))


def trace_sharded(shape=(8, 64), k=256, n=384, r=16, adds=False, **options):
    """Traces values and gradients on a mesh of four, and lowers them for a GPU."""
    (member,) = draw_members(k, [(n, r)])
    options |= {"scale": 2.0, "kernels": "pallas", "row_axes": (DATA_AXIS,)}

    def loss(x, a, b, residual):
        y = lora_linear(x, member["w"], a, b, residual=residual, **options)
        return y.astype(jnp.float32).sum()

    mesh, residual = make_mesh(4), draw(1, *shape, n) if adds else None
    with jax.set_mesh(mesh), interpreted(132):
        gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3) if adds else (0, 1, 2)))
        return gradients.trace(draw(0, *shape, k), member["a"], member["b"], residual)


@pytest.mark.parametrize("drops, adds", [(False, False), (True, False), (False, True)])
def test_under_a_mesh_every_kernel_sees_its_shard_of_the_rows_and_nothing_is_gathered(drops, adds):
    options = {"dropout_rate": RATE, "dropout_key": jax.random.key(0)} if drops else {}
    traced = trace_sharded(adds=adds, **options)
    reduced = [line for line in str(traced.jaxpr).splitlines() if " psum[axes=('data',)" in line]
    assert sorted(line.split("=")[0].split(":")[1].strip() for line in reduced) == [
        "f32[16,384]",  # of b
        "f32[256,16]",  # of a
    ]
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    assert len(calls) == 5
    for call in calls:
        types = call.rsplit(" : ", 1)[1]
        assert "tensor<128x" in types and "tensor<512x" not in types and "x64x" not in types
    assert "all_gather" not in text and "all_to_all" not in text
    assert text.count('"stablehlo.all_reduce"') == 2
    assert ("partition_id" in text) == drops  # rows are numbered across the shards


@pytest.mark.parametrize("drops", [False, True])
def test_plain_xla_under_a_mesh_gathers_nothing(drops):
    options = {"dropout_rate": RATE, "dropout_key": jax.random.key(0)} if drops else {}
    (member,), mesh = draw_members(256, [(384, 16)]), make_mesh(4)

    def loss(x, a, b):
        y = lora_linear(
            x, member["w"], a, b, scale=2.0, kernels="xla", row_axes=(DATA_AXIS,), **options
        )
        return y.astype(jnp.float32).sum()

    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(DATA_AXIS))
    with jax.set_mesh(mesh):
        x = jax.device_put(draw(0, 8, 64, 256), rows)
        gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
        text = str(gradients.lower(x, member["a"], member["b"]).compile().as_text())
    assert "all-gather" not in text and "all-to-all" not in text
    assert "all-reduce" in text


@pytest.mark.parametrize(
    "shape, rate, message",
    [
        ((6, 64), 0.0, "x has 6 rows of rows, which 4 shards do not divide"),
        ((4, 24), 0.3, "with dropout a shard needs a multiple of 16 rows, got 24"),
    ],
)
def test_refuses_rows_that_the_shards_do_not_divide(shape, rate, message):
    with pytest.raises(ValueError, match=message):
        trace_sharded(shape, dropout_rate=rate, dropout_key=jax.random.key(0))
