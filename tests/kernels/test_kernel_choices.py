"""Which kernels an operation is made of, with which tiles, and what it refuses."""

import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_kernels import (
    LoraWeights,
    tuning,
)
from lorax_kernels.device import interpreted
from lorax_kernels.lora_linear import choice, fused, project
from lorax_kernels.lora_linear import gradient as gradient_module
from lorax_kernels.lora_linear.choice import padded_rank
from lorax_kernels.lora_linear.plan import SHARED_MEMORY_BYTES, MatmulConfig
from tests.kernels.interpreter import interpret
from tests.kernels.layers import (
    bundle,
    check,
    draw,
    draw_members,
    exact_group,
    group,
    single,
    swiglu,
    weights,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_kernel_at_a_time")]


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
