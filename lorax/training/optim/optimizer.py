"""The optimizer of a run, as an optax chain."""

from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from lorax.config.train import TrainConfig
from lorax.training.optim.adam import scale_by_adam
from lorax.training.optim.groups import scale_by_settings
from lorax.training.optim.schedules import make_schedule
from lorax.training.optim.stacking import stack_alike, unstack

_UPDATED_TOGETHER = 128
"""Most leaves of one shape that are updated as a stack. XLA rebuilds the whole stack for each leaf:
compile time grows with the square of their number, to half a minute for 192."""


def make_optimizer(train: TrainConfig, total_steps: int) -> optax.GradientTransformation:
    """Chains clipping, the optimizer's direction, decoupled weight decay and the schedule.

    ``p ← p − rate(t) · (direction(clip(g)) + weight_decay · p)``; the decay leaves out biases and
    norms, which are the arrays with fewer than two dimensions. Moments and updates are float32
    whatever the parameters are. Where the settings give a group of parameters a learning rate of
    its own, ``rate(t)`` is multiplied by that rate over `learning_rate`: see `groups.py`.

    Args:
        train: The optimizer and its settings.
        total_steps: Optimizer steps of the whole run, for the schedule.

    Returns:
        An optax transformation; its `update` needs the parameters.

    Raises:
        ValueError: As `make_schedule`; and by `init`, if no parameter is in a group whose learning
            rate is set.
    """

    def matrices(params):
        return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)

    direction = [_choose_direction(train)]
    if train.max_grad_norm > 0:
        direction.insert(0, optax.clip_by_global_norm(train.max_grad_norm))
    scale = [
        optax.add_decayed_weights(train.weight_decay, mask=matrices),
        optax.scale_by_learning_rate(make_schedule(train, total_steps)),
    ]
    if (by_group := scale_by_settings(train)) is not None:
        scale.append(by_group)
    if train.optim == "adafactor":  # which looks at rows and columns of each matrix
        return _compute_in_float32(optax.chain(*direction, *scale))
    return _compute_in_float32(_chain(direction, scale))


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


def _chain(
    stacked: Sequence[optax.GradientTransformation], apart: Sequence[optax.GradientTransformation]
) -> optax.GradientTransformation:
    """Chains what runs on the leaves of each shape stacked, and then what runs on each leaf.

    Adapters are hundreds of small leaves of a few shapes: one update for each is launch-bound.
    `stacked` must treat every element by itself, and must not read the parameters: XLA cannot
    update parameters in place that are read in a stack.
    """
    first = optax.chain(*stacked)
    last = optax.chain(*apart)
    n = len(stacked)

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
