"""Every format keeps one contract; a format of one's own is one file, and one line in a list."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

import lorax
from lorax.devices.mesh import DATA_AXIS, make_mesh
from lorax.planning.kernels import kernel_choices
from lorax.runs.model import Blueprint
from lorax.runs.run import run_training
from lorax.weights import formats
from lorax.weights.dense import DENSE
from lorax.weights.formats import format_of
from lorax_kernels import Matrix, dense, lora_linear
from lorax_kernels.weights import kernel_obstacle
from tests.bounds import EXACT, distance, rounding
from tests.int8 import INT8, Int8
from tests.tiny import shallow_model

# Four devices can divide either side, in whole blocks of 64 along k.
SHAPES = [(256, 192), (512, 8)]
DTYPES = ["float64", "float32", "bfloat16"]


def draw(seed, *shape, dtype="float32"):
    values = np.random.default_rng(seed).standard_normal(shape) / shape[0] ** 0.5
    return jnp.asarray(values).astype(dtype)


def check_what_is_stored(format, shape, dtype):
    matrix = draw(0, *shape, dtype=dtype)
    stored = jax.jit(format.store)(matrix)
    assert (tuple(stored.shape), jnp.dtype(stored.dtype)) == (shape, dtype)
    for asked in (None, *DTYPES):
        meant = format.dense(stored, asked)
        assert (meant.shape, meant.dtype) == (shape, asked or dtype)
        np.testing.assert_array_equal(meant, dense(stored, asked))
    if format is DENSE:
        np.testing.assert_array_equal(format.dense(stored), matrix)
    # Four bits at least: what is stored is the matrix, and no other.
    assert distance(format.dense(stored, "float64"), matrix) < 0.2
    leaves, structure = jax.tree.flatten(stored)
    again = jax.tree.unflatten(structure, leaves)
    np.testing.assert_array_equal(format.dense(again), format.dense(stored))


def check_bytes(format, shape, dtype):
    stored = format.store(draw(0, *shape, dtype=dtype))
    assert format.bytes(shape, dtype) == sum(leaf.nbytes for leaf in jax.tree.leaves(stored))


def check_parts(format, shape, dtype):
    mesh, x = make_mesh(4), draw(1, 8, shape[0], dtype=dtype)
    stored = format.store(draw(0, *shape, dtype=dtype))
    leaves, structure = jax.tree.flatten(stored)
    multiply = jax.jit(functools.partial(product, kernels="auto"))
    want = multiply(x, stored)
    for spec in ((), (DATA_AXIS,), (None, DATA_AXIS)):
        parts = format.parts(PartitionSpec(*spec))
        places = [NamedSharding(mesh, part) for part in parts]
        placed = [jax.device_put(*pair) for pair in zip(leaves, places, strict=True)]
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in placed)
        if spec:  # what is shared by all devices is little
            assert held < 0.3 * format.bytes(shape, dtype)
        got = multiply(x, jax.tree.unflatten(structure, placed))
        unit = float(jnp.finfo(dtype).eps)
        assert distance(got, want) <= rounding(shape[0], dtype=dtype) + unit


def product(x, w: Matrix, **options):
    (k, n), r = w.shape, 3
    a, b = draw(2, k, r, dtype=x.dtype), draw(3, r, n, dtype=x.dtype)
    return lora_linear(x, w, a, b, scale=2.0, **options)


def check_products(format, shape, dtype):
    (k, n), r = shape, 3
    x, stored = draw(1, 24, k, dtype=dtype), format.store(draw(0, k, n, dtype=dtype))
    a, b, dy = (draw(i, *s, dtype=dtype) for i, s in enumerate([(k, r), (r, n), (24, n)], 2))
    found = []
    for w in (stored, format.dense(stored)):
        y, pull = jax.vjp(lambda *v, w=w: lora_linear(v[0], w, *v[1:], scale=2.0), x, a, b)
        found.append((y, *pull(dy)))
    bound = EXACT if dtype == "float64" else rounding(max(*shape, 24), dtype=dtype)
    for got, want in zip(*found, strict=True):
        assert got.dtype == dtype
        assert distance(got, want) <= bound


def check_what_it_says(format, shape, dtype):
    obstacle = format.obstacle(shape, dtype)
    assert obstacle == kernel_obstacle(format.store(draw(0, *shape, dtype=dtype)))
    # It is the end of a sentence: "kernels is pallas, but …; use auto or xla".
    assert obstacle is None or (obstacle[0].islower() and " " in obstacle and obstacle[-1] != ".")
    assert format.files and all(map(str.isprintable, (*format.files, *format.files.values())))
    assert len({one.name for one in formats.FORMATS}) == len(formats.FORMATS)
    assert hash(format) == hash(format)


CONTRACT = [check_what_is_stored, check_bytes, check_parts, check_products, check_what_it_says]


def hold_to_contract(check, shape, dtype):
    for format in formats.FORMATS:
        with jax.enable_x64(True):
            check(format, shape, dtype)


every_case = [
    pytest.mark.parametrize("dtype", DTYPES),
    pytest.mark.parametrize("shape", SHAPES, ids=str),
    pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__[6:]),
]


def cases(test):
    return functools.reduce(lambda marked, mark: mark(marked), every_case, test)


@cases
def test_every_format_keeps_the_contract(check, shape, dtype):
    hold_to_contract(check, shape, dtype)


@cases
def test_a_format_of_ones_own_is_held_to_it_once_it_is_in_the_list(
    check, shape, dtype, monkeypatch
):
    seen = []
    monkeypatch.setattr(formats, "FORMATS", [INT8])
    hold_to_contract(lambda *case: (seen.append(case[0].name), check(*case)), shape, dtype)
    assert seen == ["int8"]


@pytest.mark.slow
def test_a_run_trains_saves_and_exports_on_a_base_that_is_stored_so(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "FORMATS", [INT8, *formats.FORMATS])
    config = lorax.load_config(
        "configs/tiny_cpu.yaml",
        [
            f"model.name_or_path={shallow_model()}",
            "train.max_steps=3",
            "eval.exact_match=false",
            "lora.target_modules=[q_proj, up_proj, down_proj]",
            "save.export=[peft, peft-portable, merged]",
            f"save.output_dir={tmp_path / 'run'}",
        ],
    )
    assert format_of(config.model) is INT8
    blueprint = Blueprint.of(config)
    for model in (blueprint.shapes, lorax.build_model(config)):
        layer = model.model.layers[0]
        kinds = [type(each.kernel.get_value()) for each in (layer.mlp.up_proj, layer.mlp.gate_proj)]
        assert kinds == [Int8, Int8]
    choices = kernel_choices(config, blueprint.shapes)
    assert choices and {choice.kernel for choice in choices} == {"xla"}
    summary = run_training(config, Console(quiet=True))  # which reads back what it exports
    assert summary.steps == 3 and {"adapter", "merged"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    merged = lorax.load_model(tmp_path / "run" / "merged", dtype=jnp.float32)
    exact = lorax.load_model(config.model.name_or_path, dtype=jnp.float32)
    kernels = [m.model.layers[0].mlp.gate_proj.kernel.get_value() for m in (merged, exact)]
    np.testing.assert_array_equal(kernels[0], INT8.store(kernels[1]).dense())
    assert not np.array_equal(*kernels)
