import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from transformers import get_scheduler
from transformers.optimization import Adafactor

from lorax.config.train import LrSchedulerKwargs, TrainConfig
from lorax.training.optim.adam import scale_by_adam
from lorax.training.optim.optimizer import make_optimizer
from lorax.training.optim.schedules import make_schedule, warmup_note
from tests.bounds import assert_equal_after_steps

HUGGING_FACE_NAMES = {
    "cosine_with_min_lr": "cosine_with_min_lr",
    "wsd": "warmup_stable_decay",
}
SCHEDULES = [
    ("linear", {}),
    ("cosine", {}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.0}),
    ("constant_with_warmup", {}),
    ("wsd", {"num_decay_steps": 5}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 3}),
    ("polynomial", {}),
    ("polynomial", {"lr_end": 1e-5, "power": 2.0}),
]


def hugging_face_rates(train: TrainConfig, warmup: int, total_steps: int) -> np.ndarray:
    """The rate that each optimizer step of the Trainer's loop uses."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=train.learning_rate)
    scheduler = get_scheduler(
        HUGGING_FACE_NAMES.get(train.lr_scheduler_type, train.lr_scheduler_type),
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=total_steps,
        scheduler_specific_kwargs=train.lr_scheduler_kwargs.model_dump(exclude_none=True),
    )
    rates = []
    for _ in range(total_steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return np.array(rates)


@pytest.mark.parametrize(
    ("kind", "settings", "warmup", "total_steps"),
    [
        (kind, settings, warmup, total_steps)
        for warmup, total_steps in [(0, 1), (0, 17), (1, 20), (5, 23), (40, 30)]
        for kind, settings in SCHEDULES
        if warmup + settings.get("num_decay_steps", 0) <= total_steps or kind != "wsd"
    ],
)
def test_schedule_equals_hugging_face_at_every_step(kind, settings, warmup, total_steps):
    train = TrainConfig(
        lr_scheduler_type=kind,
        learning_rate=3e-4,
        warmup_steps=warmup,
        lr_scheduler_kwargs=LrSchedulerKwargs(**settings),
    )
    schedule = make_schedule(train, total_steps)
    rates = jax.vmap(schedule)(jnp.arange(total_steps))
    assert rates.dtype == jnp.float32
    expected = hugging_face_rates(train, warmup, total_steps)
    np.testing.assert_allclose(rates, expected, rtol=2e-6, atol=0)


def test_constant_schedule_is_constant():
    train = TrainConfig(lr_scheduler_type="constant", learning_rate=3e-4)
    rates = jax.vmap(make_schedule(train, 7))(jnp.arange(7))
    np.testing.assert_array_equal(rates, np.full(7, 3e-4, np.float32))


def test_schedule_of_a_long_run_keeps_its_precision_to_the_last_step():
    total_steps = 100_003
    train = TrainConfig(lr_scheduler_type="cosine", warmup_steps=2_000)
    steps = np.array([0, 1, 1_999, 2_000, 2_001, 50_000, 100_000, 100_001, 100_002])
    rates = jax.vmap(make_schedule(train, total_steps))(jnp.asarray(steps))
    progress = (steps - 2_000) / (total_steps - 2_000)
    cosine = np.sin(0.5 * np.pi * (1 - progress)) ** 2
    expected = 2e-4 * np.where(steps < 2_000, steps / 2_000, cosine)
    np.testing.assert_allclose(rates, expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("kind", ["linear", "cosine", "polynomial"])
def test_schedule_stays_at_its_end_after_the_run(kind):
    schedule = make_schedule(TrainConfig(lr_scheduler_type=kind), 10)
    assert float(schedule(25)) == float(schedule(10)) < 1.1e-7


@pytest.mark.parametrize(("ratio", "total_steps"), [(0.1, 25), (0.05, 99), (0.03, 100), (1.0, 4)])
def test_warmup_ratio_rounds_up(ratio, total_steps):
    by_ratio = make_schedule(TrainConfig(warmup_ratio=ratio), total_steps)
    steps = math.ceil(ratio * total_steps)
    by_steps = make_schedule(TrainConfig(warmup_steps=steps), total_steps)
    for step in range(total_steps):
        assert by_ratio(step) == by_steps(step)
    assert by_ratio(0) == 0.0


def test_schedule_that_does_not_fit_is_refused():
    settings = LrSchedulerKwargs(num_decay_steps=8)
    train = TrainConfig(lr_scheduler_type="wsd", warmup_steps=3, lr_scheduler_kwargs=settings)
    with pytest.raises(ValueError, match=r"3 \+ 8 steps are more than 10; lower"):
        make_schedule(train, 10)
    with pytest.raises(ValueError, match="total_steps >= 1, got 0"):
        make_schedule(TrainConfig(), 0)


def make_problem(seed: int, steps: int):
    """Two matrices, a bias and a gradient for each step, large and small."""
    generator = np.random.default_rng(seed)
    shapes = {"a": (16, 4), "b": (4, 24), "bias": (24,)}
    params = {name: generator.normal(size=shape) for name, shape in shapes.items()}
    scales = 10.0 ** generator.uniform(-4, 2, size=steps)
    gradients = [
        {name: scale * generator.normal(size=shape) for name, shape in shapes.items()}
        for scale in scales
    ]
    to_float32 = lambda tree: {name: value.astype(np.float32) for name, value in tree.items()}
    return to_float32(params), [to_float32(gradient) for gradient in gradients]


def run_ours(train: TrainConfig, params, gradients) -> Any:
    optimizer: Any = make_optimizer(train, len(gradients))
    params = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(jax.tree.map(jnp.asarray, gradient), state, params)
        params = optax.apply_updates(params, updates)
    return params


def run_torch(train: TrainConfig, params, gradients, dtype, make):
    tensors = {name: torch.tensor(value, dtype=dtype) for name, value in params.items()}
    for tensor in tensors.values():
        tensor.requires_grad_()
    groups = [
        {"params": [tensors["a"], tensors["b"]], "weight_decay": train.weight_decay},
        {"params": [tensors["bias"]], "weight_decay": 0.0},
    ]
    optimizer = make(groups)
    warmup = math.ceil(train.warmup_ratio * len(gradients))
    scheduler = get_scheduler(train.lr_scheduler_type, optimizer, warmup, len(gradients))
    for gradient in gradients:
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(gradient[name], dtype=dtype)
        if train.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(list(tensors.values()), train.max_grad_norm)
        optimizer.step()
        scheduler.step()
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def relative_error(actual, expected, start) -> float:
    """Largest error over all arrays, relative to how far the parameters moved."""
    errors = [
        np.linalg.norm(np.asarray(actual[name], np.float64) - expected[name])
        / np.linalg.norm(np.asarray(expected[name], np.float64) - start[name])
        for name in expected
    ]
    return max(errors)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.0, 0.5)])
def test_adamw_equals_torch(betas, max_grad_norm):
    train = TrainConfig(
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        warmup_ratio=0.2,
        weight_decay=0.1,
        adam_beta1=betas[0],
        adam_beta2=betas[1],
        max_grad_norm=max_grad_norm,
    )
    start, gradients = make_problem(seed=0, steps=12)
    make = lambda groups: torch.optim.AdamW(groups, lr=train.learning_rate, betas=betas, eps=1e-8)
    ours = run_ours(train, start, gradients)
    theirs = run_torch(train, start, gradients, torch.float32, make)
    for name in ours:
        assert_equal_after_steps(ours[name], theirs[name], len(gradients))
    # Against float64, ours may be twice as far as torch's own float32. The norm that torch clips
    # by has 1e-6 added to it.
    exact = run_torch(train, start, gradients, torch.float64, make)
    bound = 2 * relative_error(theirs, exact, start)
    clipping = 2e-6 if max_grad_norm else 0.0
    assert relative_error(ours, exact, start) <= bound + clipping


def test_adam_directions_are_exact_from_the_first_step():
    # Sixteen roundings at most; 1 - float32(0.999) in place of 0.001 would be 3e-5 off.
    gradient = jnp.asarray([[1e-3, -2.0, 3e4]])
    transform: Any = scale_by_adam(0.9, 0.999, 0.0)
    state = transform.init(gradient)
    for _ in range(3):
        direction, state = transform.update(gradient, state)
        np.testing.assert_allclose(direction, jnp.sign(gradient), rtol=16 * 2.0**-24)


def test_adafactor_equals_hugging_face():
    train = TrainConfig(optim="adafactor", learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.0)
    start, gradients = make_problem(seed=1, steps=8)
    make = lambda groups: Adafactor(
        groups, lr=train.learning_rate, scale_parameter=False, relative_step=False
    )
    ours = run_ours(train, start, gradients)
    theirs = run_torch(train, start, gradients, torch.float32, make)
    for name in ours:
        assert_equal_after_steps(ours[name], theirs[name], len(gradients))


def test_sgd_equals_torch():
    train = TrainConfig(optim="sgd", learning_rate=1e-2, weight_decay=0.1)
    start, gradients = make_problem(seed=2, steps=8)
    make = lambda groups: torch.optim.SGD(groups, lr=train.learning_rate)
    ours = run_ours(train, start, gradients)
    theirs = run_torch(train, start, gradients, torch.float32, make)
    for name in ours:
        assert_equal_after_steps(ours[name], theirs[name], len(gradients))


def test_lion_follows_the_paper():
    train = TrainConfig(
        optim="lion",
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        weight_decay=0.1,
        adam_beta1=0.8,
        adam_beta2=0.95,
        max_grad_norm=0.0,
    )
    start, gradients = make_problem(seed=3, steps=6)
    ours = run_ours(train, start, gradients)
    for name, value in start.items():
        momentum, expected = np.zeros_like(value), value
        decay = 0.1 if value.ndim > 1 else 0.0
        for step, gradient in enumerate(gradients):
            rate = 1e-2 * (1 - step / len(gradients))
            direction = np.sign(0.8 * momentum + 0.2 * gradient[name])
            momentum = 0.95 * momentum + 0.05 * gradient[name]
            expected = expected - rate * (direction + decay * expected)
        assert_equal_after_steps(ours[name], expected, len(gradients))


@pytest.mark.parametrize("optim", ["adamw", "lion", "sgd", "adafactor"])
def test_weight_decay_leaves_biases_and_norms(optim):
    train = TrainConfig(optim=optim, learning_rate=0.1, weight_decay=0.5)
    optimizer: Any = make_optimizer(train, 10)
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3), "scale": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
    assert not updates["bias"].any() and not updates["scale"].any()


@pytest.mark.parametrize("optim", ["adamw", "lion", "adafactor"])
def test_moments_and_updates_of_bfloat16_parameters_are_float32(optim):
    params = {"kernel": jnp.ones((4, 3), jnp.bfloat16), "bias": jnp.ones(3, jnp.bfloat16)}
    optimizer: Any = make_optimizer(TrainConfig(optim=optim), 10)
    updates, state = optimizer.update(params, optimizer.init(params), params)
    arrays = [leaf for leaf in jax.tree.leaves((updates, state)) if leaf.ndim]
    assert arrays and all(leaf.dtype == jnp.float32 for leaf in arrays)


def test_large_gradients_are_scaled_down_to_the_norm():
    train = TrainConfig(
        optim="sgd", learning_rate=1.0, weight_decay=0.0, lr_scheduler_type="constant"
    )
    params = {"a": jnp.zeros((3, 1)), "b": jnp.zeros((4, 1))}
    gradients = {"a": jnp.full((3, 1), 10.0), "b": jnp.full((4, 1), -10.0)}
    optimizer: Any = make_optimizer(train, 10)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_allclose(optax.tree.norm(updates), 1.0, rtol=1e-6)
    small = jax.tree.map(lambda leaf: leaf * 0.001, gradients)
    updates, _ = optimizer.update(small, optimizer.init(params), params)
    np.testing.assert_allclose(updates["a"], -small["a"], rtol=1e-6)


def test_optimizer_takes_the_state_of_an_nnx_module():
    state = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Param)
    optimizer: Any = make_optimizer(TrainConfig(), 10)
    gradients = jax.tree.map(jnp.ones_like, state)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(state), state)
    assert jax.tree.structure(updates) == jax.tree.structure(state)


@pytest.mark.parametrize(
    "settings, told",
    [
        (dict(warmup_steps=19), None),
        (dict(warmup_ratio=0.9), None),
        (
            dict(warmup_steps=20),
            "train.warmup_steps: the warm-up takes 20 steps and the run has 20",
        ),
        (
            dict(warmup_steps=500),
            r"500 steps and the run has 20, .* ends at 7.6e-06 and never reaches 0.0002: ",
        ),
        (
            dict(warmup_ratio=1.0),
            "train.warmup_ratio: the warm-up takes 20 steps and the run has 20",
        ),
    ],
)
def test_a_warm_up_as_long_as_the_run_is_told_with_where_it_ends(settings, told):
    train = TrainConfig(lr_scheduler_type="linear", **settings)
    found = warmup_note(train, 20)
    assert (found is None) == (told is None)
    if told is not None:
        assert re.search(told, found), found
        last = float(make_schedule(train, 20)(19))
        assert f"{last:.2g}" in str(found) and last < train.learning_rate
