"""The first values of A and B, against PEFT's."""

import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file

from lorax.adapters.initial import (
    EMBEDDING,
    INITIALISATIONS,
    NEEDS_MORE,
    as_plain,
    initialisation,
    is_known,
    leading_svd,
    plain_alpha,
    start,
)
from tests.bounds import distance, rounding
from tests.int8 import INT8

pytestmark = pytest.mark.filterwarnings("ignore")

R, ALPHA = 4, 6.0
SCALE = ALPHA / R
KEY = jax.random.key(3)
NAMES = [*(each.name for each in INITIALISATIONS), "pissa_niter_2"]
SHAPES = [(24, 16), (16, 24)]
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def named(name):
    return initialisation(True if name == "true" else name)


def decaying(shape, factor=0.6, seed=0):
    """Returns a matrix whose singular values fall by a factor, so that their vectors are sharp."""
    random = np.random.default_rng(seed)
    u, _, vt = np.linalg.svd(random.normal(size=shape), full_matrices=False)
    return ((u * factor ** np.arange(len(vt))) @ vt).astype(np.float32)


def peft_model(module, init, r=R, seed=1, **settings) -> Any:
    torch.manual_seed(seed)
    settings = dict(lora_alpha=ALPHA, target_modules=["0"]) | settings
    config = LoraConfig(r=r, init_lora_weights=init, **settings)
    return get_peft_model(torch.nn.Sequential(module), config)


def peft_values(model):
    """Returns PEFT's A (k, r), B (r, n) and W (k, n)."""
    layer = model.base_model.model[0]
    found = (layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.weight)
    return [each.detach().float().numpy().T.copy() for each in found]


def peft_start(w, init, dtype="float32", r=R, seed=1):
    module = torch.nn.Linear(*w.shape, bias=False, dtype=TORCH[dtype])
    with torch.no_grad():
        module.weight.copy_(torch.tensor(np.array(w, np.float32)).T)
    return peft_values(peft_model(module, init, r, seed))


def product(a, b):
    return np.asarray(a, np.float64) @ np.asarray(b, np.float64)


@pytest.mark.parametrize("name", ["true", "gaussian", "orthogonal"])
def test_random_ones_are_distributed_as_in_peft(name):
    w = jnp.zeros((600, 400), jnp.bfloat16)
    a, b, same = start(named(name), KEY, w, 8, SCALE)
    theirs = peft_start(w, True if name == "true" else name, r=8)
    assert same is w
    for ours, other in zip((a, b), theirs[:2], strict=True):
        assert ours.shape == other.shape and ours.dtype == jnp.float32
        # Deviations of the deviation and the mean of half as many independent samples, at most.
        spread = 5 / math.sqrt(ours.size)
        assert np.std(ours) == pytest.approx(float(np.std(other)), rel=2 * spread)
        assert abs(np.mean(ours)) <= 2 * spread * np.std(ours)
        if name != "orthogonal":
            assert np.abs(ours).max() == pytest.approx(float(np.abs(other).max()), rel=0.25)
    other_a = start(named(name), jax.random.key(4), w, 8, SCALE).a
    assert distance(other_a, a) > 0.5


def test_the_uniform_one_fills_peft_s_bounds_and_the_normal_one_has_deviation_one_over_r():
    w = jnp.zeros((400, 8))
    uniform = start(named("true"), KEY, w, R, SCALE).a
    assert 0.98 / 20 < np.abs(uniform).max() <= 1 / 20
    assert np.std(start(named("gaussian"), KEY, w, R, SCALE).a) == pytest.approx(1 / R, rel=0.1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_layer_computes_what_it_did(name, shape):
    w = jnp.asarray(decaying(shape))
    a, b, base = start(named(name), KEY, w, R, SCALE)
    assert (a.shape, b.shape) == ((shape[0], R), (R, shape[1]))
    bound = rounding(shape[0])
    assert distance(np.asarray(base, np.float64) + SCALE * product(a, b), w) <= bound
    if not named(name).changes_base:
        assert base is w
        assert np.linalg.norm(product(a, b)) <= bound * np.linalg.norm(a) * np.linalg.norm(b)


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonal_factors_have_half_the_rank_each_and_no_direction_in_common(shape):
    for a, b, _ in (
        start(named("orthogonal"), KEY, jnp.zeros(shape), R, SCALE),
        peft_start(jnp.zeros(shape), "orthogonal"),
    ):
        for factor in (a, b):
            values = np.linalg.svd(factor, compute_uv=False)
            assert values[R // 2 - 1] > 0.05 and values[R // 2] < 1e-6
        assert np.linalg.norm(product(a, b)) < 1e-6


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_what_moves_a_part_of_the_base_moves_peft_s(name, shape, dtype):
    w = jnp.asarray(decaying(shape), dtype)
    ours, theirs = start(named(name), KEY, w, R, SCALE), peft_start(w, name, dtype)
    # PEFT rounds A and B to the base's dtype, after it has changed the base.
    close = 1e-5 if dtype == "float32" else 1e-2
    assert distance(product(ours.a, ours.b), product(*theirs[:2])) <= close
    assert ours.w.dtype == w.dtype
    # PEFT's differs by the rounding of float32, so that a few elements round to a neighbour.
    between = 1e-5 if dtype == "float32" else 1e-3
    assert distance(ours.w, theirs[2]) <= between
    if name == "pissa":
        want = np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)
        got = np.linalg.svd(SCALE * product(ours.a, ours.b), compute_uv=False)
        assert distance(got[:R], want[:R]) <= 1e-5 and np.all(got[R:] <= 1e-5)
        # Both factors carry the root of each singular value.
        for norms in (np.linalg.norm(ours.a, axis=0), np.linalg.norm(ours.b, axis=1)):
            assert distance(norms, np.sqrt(want[:R] / SCALE)) <= 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_olora_s_factors_are_peft_s_up_to_signs(shape):
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    (a, b, _), theirs = start(named("olora"), KEY, jnp.asarray(w), R, SCALE), peft_start(w, "olora")
    a, b = np.asarray(a), np.asarray(b)
    signs = np.sign(np.sum(b * theirs[1], axis=1))
    assert distance(a * signs, theirs[0]) <= 1e-5
    assert distance(b * signs[:, None], theirs[1]) <= 1e-5


@pytest.mark.parametrize("shape", [(80, 60), (60, 80)])
def test_the_randomised_one_leaves_as_little_as_peft_s_and_less_with_iterations(shape):
    w = decaying(shape, factor=0.9)
    least = np.sqrt(np.sum(np.linalg.svd(w, compute_uv=False)[R:] ** 2))
    keys = jax.random.split(KEY, 31)

    def excess(bases):
        """Returns by which share they leave more than the exact one: the middle of several."""
        found = np.linalg.norm(bases, axis=(1, 2)) / least - 1
        assert found.min() >= -1e-5
        return np.median(found)

    mine, theirs = [], []
    for name in ("pissa_niter_0", "pissa_niter_2", "pissa_niter_16"):
        begin = jax.vmap(lambda key, name=name: start(named(name), key, jnp.asarray(w), R, SCALE).w)
        mine.append(excess(begin(keys)))
        theirs.append(excess(np.stack([peft_start(w, name, seed=seed)[2] for seed in range(9)])))
    assert mine[0] > 2 * mine[1] > 4 * mine[2] and max(mine[2], theirs[2]) <= 1e-3
    for ours, other in zip(mine[:2], theirs[:2], strict=True):
        assert other / 3 <= ours <= 3 * other


def test_the_leading_svd_of_a_matrix_of_low_rank_is_its_svd():
    random = np.random.default_rng(2)
    matrix = (random.normal(size=(70, 5)) @ random.normal(size=(5, 50))).astype(np.float32)
    u, s, vt = leading_svd(KEY, jnp.asarray(matrix), 5, 1)
    u, s, vt = np.asarray(u), np.asarray(s), np.asarray(vt)
    assert distance((u * s) @ vt, matrix) <= 1e-5
    assert distance(s, np.linalg.svd(matrix, compute_uv=False)[:5]) <= 1e-5
    assert distance(u.T @ u, np.eye(5)) <= 1e-5 and distance(vt @ vt.T, np.eye(5)) <= 1e-5


@pytest.mark.parametrize("init", [True, "gaussian", "pissa", "olora", "orthogonal"])
def test_an_embedding_begins_as_in_peft_whatever_the_name(init):
    model = peft_model(torch.nn.Embedding(500, 40), init)
    layer = model.base_model.model[0]
    w = jnp.asarray(layer.weight.detach().numpy())
    a, b, same = start(EMBEDDING, KEY, w, R, SCALE)
    theirs = layer.lora_embedding_A["default"].T, layer.lora_embedding_B["default"].T
    assert same is w and not np.any(a) and not torch.any(theirs[0])
    assert (a.shape, b.shape) == (theirs[0].shape, theirs[1].shape)
    for each in (np.asarray(b), theirs[1].detach().numpy()):
        assert np.std(each) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("name", NAMES)
def test_stacked_layers_under_jit_begin_as_each_alone(name):
    layers = jnp.stack([jnp.asarray(decaying((24, 16), seed=seed)) for seed in range(3)])
    keys = jax.random.split(KEY, 3)

    def begin(key, w):
        return start(named(name), key, w, R, SCALE)

    stacked = jax.jit(jax.vmap(begin))(keys, layers)
    assert jax.eval_shape(jax.vmap(begin), keys, layers) == jax.eval_shape(lambda: stacked)
    for index in range(3):
        a, b, w = begin(keys[index], layers[index])
        if b.any():
            got = product(stacked.a[index], stacked.b[index])
            size = np.linalg.norm(a) * np.linalg.norm(b)
            assert np.linalg.norm(got - product(a, b)) <= 1e-5 * size
        else:
            np.testing.assert_allclose(stacked.a[index], a, rtol=1e-6)
        assert distance(stacked.w[index], w) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_shapes_begins_without_values(name):
    w = jax.ShapeDtypeStruct((24, 16), jnp.bfloat16)
    found = jax.eval_shape(lambda w: start(named(name), KEY, w, R, SCALE), w)
    assert [each.shape for each in found] == [(24, R), (R, 16), (24, 16)]
    assert [each.dtype for each in found] == [jnp.float32, jnp.float32, jnp.bfloat16]


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_matrix_begins_as_its_dense_form(name):
    stored: Any = INT8.store(jnp.asarray(decaying((24, 16)), jnp.bfloat16))
    a, b, w = start(named(name), KEY, stored, R, SCALE)
    dense = start(named(name), KEY, stored.dense(), R, SCALE)
    if named(name).changes_base:
        assert isinstance(w, jax.Array) and w.dtype == jnp.bfloat16
        assert distance(w, dense.w) <= 1e-2
    else:
        assert w is stored
    assert np.linalg.norm(product(a, b) - product(dense.a, dense.b)) <= 1e-2


@pytest.mark.parametrize("name", ["pissa", "olora", "pissa_niter_2"])
def test_a_rank_above_the_weight_s_own_is_refused_and_the_remedy_works(name):
    w = jnp.asarray(decaying((24, 16)))
    with pytest.raises(ValueError, match=r"r=17 is more than the 16 .* at most 16 .*24 × 16"):
        start(named(name), KEY, w, 17, SCALE)
    assert start(named(name), KEY, w, 16, SCALE).a.shape == (24, 16)
    assert start(named("true"), KEY, w, 17, SCALE).a.shape == (24, 17)


def test_an_odd_rank_is_refused_by_the_orthogonal_one_as_by_peft():
    w = jnp.zeros((24, 16))
    with pytest.raises(ValueError, match="even"):
        peft_start(w, "orthogonal", r=5)
    with pytest.raises(ValueError, match=r"r=5 is odd.* take r=6, or"):
        start(named("orthogonal"), KEY, w, 5, SCALE)
    assert start(named("orthogonal"), KEY, w, 6, SCALE).a.shape == (24, 6)


def test_names_are_peft_s_in_any_case():
    assert initialisation(True).name == "true"
    for name in ("OLoRA", "GAUSSIAN", "pissa_niter_16", "PiSSA"):
        assert initialisation(name).name == name.lower() and is_known(name)


@pytest.mark.parametrize("name", NEEDS_MORE)
def test_peft_s_other_names_say_why_they_are_not_known(name):
    assert not is_known(name)
    with pytest.raises(ValueError, match=rf"'{name}' (needs|freezes) .*; write true, gaussian, .*"):
        initialisation(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gausian", r"'gausian' is not known \(did you mean gaussian\?\); write true, gaussian, "),
        ("pissa_niter_", "'pissa_niter_' is not known.* pissa_niter_<i>"),
        ("pissa_niter_1000", "below 1000"),
        ("pissa_niter_-1", "'pissa_niter_-1' is not known"),
        (False, "False would begin with a random B"),
        (1, "1 is not known"),
        (None, "null is not known"),
        ("x" * 10_000, "is not known"),
    ],
)
def test_any_other_value_is_refused(name, said):
    assert not is_known(name)
    with pytest.raises(ValueError, match=said) as caught:
        initialisation(name)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_as_plain_lora_it_is_what_peft_saves_for_the_original_base(name, use_rslora, tmp_path):
    torch.manual_seed(0)
    module = torch.nn.Linear(24, 16, bias=False)
    w = module.weight.detach().numpy().T.copy()
    model = peft_model(module, name, use_rslora=use_rslora)
    model.peft_config["default"].init_lora_weights = True  # as PEFT's documentation asks
    model.save_pretrained(tmp_path / "initial")
    a0, b0, base = peft_values(model)
    model.peft_config["default"].init_lora_weights = name
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    a, b, _ = peft_values(model)
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    theirs = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    plain_a, plain_b = as_plain(a, b, a0, b0)
    np.testing.assert_array_equal(plain_a.T, theirs["base_model.model.0.lora_A.weight"])
    np.testing.assert_array_equal(plain_b.T, theirs["base_model.model.0.lora_B.weight"])
    assert config["r"] == 2 * R
    alpha = plain_alpha(ALPHA, use_rslora)
    assert alpha == pytest.approx(config["lora_alpha"])
    scale = ALPHA / (R**0.5 if use_rslora else R)
    assert alpha / ((2 * R) ** 0.5 if use_rslora else 2 * R) == pytest.approx(scale)
    assert distance(w + scale * product(plain_a, plain_b), base + scale * product(a, b)) <= 1e-5


def test_stacked_layers_become_plain_together():
    a, b = jnp.ones((3, 24, R)), jnp.ones((3, R, 16))
    plain_a, plain_b = as_plain(a, b, 2 * a, 3 * b)
    assert (plain_a.shape, plain_b.shape) == ((3, 24, 2 * R), (3, 2 * R, 16))
    assert np.all(plain_a @ plain_b == R - 6 * R)
