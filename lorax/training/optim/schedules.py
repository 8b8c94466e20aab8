"""Learning rates by step."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from lorax.config.train import TrainConfig
from lorax.system.wording import plural

type Schedule = Callable[[ArrayLike], Float[Array, ""]]
"""0-based step to learning rate; an `optax.Schedule`."""

type Factor = Callable[[Float[Array, ""]], Float[Array, ""]]
"""Step (0-based, as float32) to a factor of the highest learning rate, after the warm-up."""


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
    warmup = _warmup_steps(train, total_steps)
    factor = _choose_decay(train, warmup, total_steps)

    def schedule(step: ArrayLike) -> Float[Array, ""]:
        time = jnp.asarray(step).astype(jnp.float32)
        rising = time / float(max(1, warmup))
        return train.learning_rate * jnp.where(time < float(warmup), rising, factor(time))

    return schedule


def warmup_note(train: TrainConfig, total_steps: int) -> str | None:
    """Returns a warning if the warm-up takes the whole run and the highest rate is never reached.

    Args:
        train: Kind of schedule, highest rate and warm-up.
        total_steps: Optimizer steps of the whole run.
    """
    warmup = _warmup_steps(train, total_steps)
    if warmup < total_steps:
        return None
    key = "warmup_steps" if train.warmup_steps else "warmup_ratio"
    last = float(make_schedule(train, total_steps)(total_steps - 1))
    return (
        f"train.{key}: the warm-up takes {plural(warmup, 'step')} and the run has {total_steps:,}, "
        f"so the learning rate ends at {last:.2g} and never reaches {train.learning_rate:.2g}: "
        f"lower train.{key}, or train longer"
    )


def _warmup_steps(train: TrainConfig, total_steps: int) -> int:
    return train.warmup_steps or math.ceil(train.warmup_ratio * total_steps)


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
