"""Learning-rate schedules with Hugging Face's values, and the chain from gradients to updates."""

import math
from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from lorax.config.train import TrainConfig
from lorax.stacking import stack_alike, unstack

type Schedule = Callable[[ArrayLike], Float[Array, ""]]
"""0-based step to learning rate; an `optax.Schedule`."""

type Factor = Callable[[Float[Array, ""]], Float[Array, ""]]
"""Step (0-based, as float32) to a factor of the highest learning rate, after the warm-up."""

_UPDATED_TOGETHER = 128
"""Leaves of one shape that XLA may update in a few launches, making the whole stack again for each:
the time to compile this grows with the square of their number, to half a minute for 192."""


def make_schedule(train: TrainConfig, total_steps: int) -> Schedule:
    """Learning rate of step t (0-based): ``learning_rate · min(t / warmup, 1) · decay(t)``.

    The values are those of Hugging Face's `get_scheduler`: the first step of a warm-up has the
    rate 0. Differences of steps are exact, so the last small rates are as precise as the first.

    Args:
        train: Kind of schedule, highest rate, warm-up and settings.
        total_steps: Optimizer steps of the whole run; the decay ends there.

    Returns:
        A function from the step, which may be traced, to a float32 scalar.

    Raises:
        ValueError: If `total_steps` is not positive or a `wsd` schedule does not fit into it.
    """
    if total_steps < 1:
        raise ValueError(f"a schedule needs total_steps >= 1, got {total_steps}")
    warmup = train.warmup_steps or math.ceil(train.warmup_ratio * total_steps)
    factor = _choose_decay(train, warmup, total_steps)

    def schedule(step: ArrayLike) -> Float[Array, ""]:
        time = jnp.asarray(step).astype(jnp.float32)
        rising = time / float(max(1, warmup))
        return train.learning_rate * jnp.where(time < float(warmup), rising, factor(time))

    return schedule


def _choose_decay(train: TrainConfig, warmup: int, total: int) -> Factor:
    settings = train.lr_scheduler_kwargs
    match train.lr_scheduler_type:
        case "constant" | "constant_with_warmup":
            return jnp.ones_like
        case "linear":
            return lambda time: _remaining(time, warmup, total)
        case "cosine":
            return lambda time: _half_cosine(_remaining(time, warmup, total))
        case "cosine_with_min_lr":
            low = settings.min_lr_rate or 0.0
            return lambda time: low + (1 - low) * _half_cosine(_remaining(time, warmup, total))
        case "polynomial":
            power = 1.0 if settings.power is None else settings.power
            lr_end = 1e-7 if settings.lr_end is None else settings.lr_end
            low = lr_end / train.learning_rate
            return lambda time: low + (1 - low) * _remaining(time, warmup, total) ** power
        case "inverse_sqrt":
            timescale = float(settings.timescale or warmup or 10_000)
            return lambda time: jax.lax.rsqrt((time - float(warmup) + timescale) / timescale)
        case "wsd":
            decay = settings.num_decay_steps or 0
            if warmup + decay > total:
                raise ValueError(
                    f"schedule `wsd` needs warm-up and decay within the run: {warmup} + {decay} "
                    f"steps are more than {total}; lower train.lr_scheduler_kwargs.num_decay_steps"
                )
            return lambda time: _half_cosine(_remaining(time, total - decay, total))


def _remaining(time: Float[Array, ""], start: int, end: int) -> Float[Array, ""]:
    """Share of the steps between `start` and `end` still to come: 1 before, 0 after."""
    return jnp.clip((float(end) - time) / float(max(1, end - start)), 0.0, 1.0)


def _half_cosine(remaining: Float[Array, ""]) -> Float[Array, ""]:
    """``½·(1 + cos π·(1 − x))``, as ``sin²(π·x/2)``: without cancellation where it is near 0."""
    return jnp.square(jnp.sin(0.5 * math.pi * remaining))


def make_optimizer(train: TrainConfig, total_steps: int) -> optax.GradientTransformation:
    """Chains clipping, the optimizer's direction, decoupled weight decay and the schedule.

    ``p ← p − rate(t) · (direction(clip(g)) + weight_decay · p)``; the decay leaves out biases and
    norms, which are the arrays with fewer than two dimensions. Moments and updates are float32
    whatever the parameters are.

    Args:
        train: The optimizer and its settings.
        total_steps: Optimizer steps of the whole run, for the schedule.

    Returns:
        An optax transformation; its `update` needs the parameters.

    Raises:
        ValueError: As `make_schedule`.
    """
    matrices = lambda params: jax.tree.map(lambda leaf: leaf.ndim >= 2, params)
    stages = [
        _choose_direction(train),
        optax.add_decayed_weights(train.weight_decay, mask=matrices),
        optax.scale_by_learning_rate(make_schedule(train, total_steps)),
    ]
    if train.max_grad_norm > 0:
        stages.insert(0, optax.clip_by_global_norm(train.max_grad_norm))
    if train.optim == "adafactor":  # which looks at rows and columns of each matrix
        return _compute_in_float32(optax.chain(*stages))
    return _compute_in_float32(_chain(stages[:-2], stages[-2:]))


def _choose_direction(train: TrainConfig) -> optax.GradientTransformation:
    match train.optim:
        case "adamw":
            return scale_by_adam(train.adam_beta1, train.adam_beta2, train.adam_epsilon)
        case "lion":
            return optax.scale_by_lion(b1=train.adam_beta1, b2=train.adam_beta2)
        case "sgd":
            return optax.identity()
        case "adafactor":
            # Hugging Face factors every matrix; optax alone would leave those of a low rank whole.
            rms = optax.scale_by_factored_rms(min_dim_size_to_factor=1)
            return optax.chain(rms, optax.clip_by_block_rms(1.0))


def scale_by_adam(beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformation:
    """Adam's direction, ``m̂ / (√v̂ + ε)`` with ``m̂ = m / (1 − β1ᵗ)``, ``v̂ = v / (1 − β2ᵗ)``.

    optax's own takes ``1 − βᵗ`` in float32, which is off by 3e-5 in the first steps, and does not
    run under strict dtype promotion.

    Args:
        beta1: Decay of the mean of the gradients.
        beta2: Decay of the mean of their squares.
        epsilon: Added to the root.

    Returns:
        A transformation of float32 gradients with float32 moments.

    Source: Kingma and Ba 2015, algorithm 1, https://arxiv.org/abs/1412.6980
    """

    def init(params: PyTree) -> optax.ScaleByAdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), zeros, zeros)

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None
    ) -> tuple[PyTree, optax.ScaleByAdamState]:
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        mu = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g * g, state.nu, updates)
        mean_share = _one_minus_power(beta1, count)
        square_share = _one_minus_power(beta2, count)
        directions = jax.tree.map(
            lambda m, v: (m / mean_share) / (jnp.sqrt(v / square_share) + epsilon), mu, nu
        )
        return directions, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _one_minus_power(decay: float, count: Int[Array, ""]) -> Float[Array, ""]:
    log_decay = math.log(decay) if decay > 0 else -math.inf
    return -jnp.expm1(count.astype(jnp.float32) * log_decay)


def _chain(
    stacked: Sequence[optax.GradientTransformation], apart: Sequence[optax.GradientTransformation]
) -> optax.GradientTransformation:
    """Chains what runs on the leaves of each shape stacked, and then what runs on each leaf.

    Adapters are hundreds of small leaves of a few shapes: an update of its own for each costs more
    in launches than in arithmetic. `stacked` must treat every element by itself, and not read the
    parameters: where XLA finds them read in a stack, it cannot write the new ones over them.
    """
    first, last, n = optax.chain(*stacked), optax.chain(*apart), len(stacked)

    def init(params: PyTree) -> optax.OptState:
        return *cast(tuple, first.init(stack_alike(params))), *cast(tuple, last.init(params))

    def update(
        updates: PyTree, state: optax.OptState, params: PyTree = None
    ) -> tuple[PyTree, optax.OptState]:
        before = cast(tuple, state)
        stacks, after = first.update(stack_alike(updates), before[:n])
        if max(len(stack) for stack in jax.tree.leaves(stacks)) > _UPDATED_TOGETHER:
            stacks = jax.lax.optimization_barrier(stacks)
        updates = unstack(cast(dict[str, jax.Array], stacks), updates)
        updates, rest = last.update(updates, before[n:], params)
        return updates, (*cast(tuple, after), *cast(tuple, rest))

    return optax.GradientTransformation(init, update)


def _compute_in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    def cast(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    def init(params: PyTree) -> optax.OptState:
        return inner.init(cast(params))

    def update(
        updates: PyTree, state: optax.OptState, params: PyTree = None
    ) -> tuple[PyTree, optax.OptState]:
        return inner.update(cast(updates), state, cast(params))

    return optax.GradientTransformation(init, update)
