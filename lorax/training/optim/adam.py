"""Adam, with exact bias correction."""

import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree


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
