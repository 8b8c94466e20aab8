"""Exact loss and gradient of many micro-batches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lorax.objectives.objective import Terms, checked
from lorax_kernels import accumulation_dtype


def accumulate(
    loss_fn: Callable[..., tuple[jax.Array, ...]],
) -> Callable[..., tuple[Any, ...]]:
    """Turns a summed loss into the exact loss and gradient of many micro-batches.

    With Lᵢ and nᵢ the sum and the count of micro-batch i, the result is that of one large batch::

        N = Σ nᵢ        loss = Σ Lᵢ / N        gradient = Σ ∇Lᵢ / N

    Sums are float32 (float64 for float64 parameters) and divided once. A micro-batch with count 0
    contributes nothing. The mean of micro-batch means, which `optax.MultiSteps` takes, differs as
    soon as the counts do.

    Args:
        loss_fn: ``(parameters, micro_batch, *rest) -> (sum of losses, count)``; it must return
            the sum, not the mean. A third value may be a dict of further sums, the figures.

    Returns:
        A function ``(parameters, micro_batches, *rest) -> (loss, count, gradients)``, or ``(loss,
        count, figures, gradients)`` if the loss has figures, which are divided by the count too.
        Each leaf of `micro_batches` and `rest` has a leading axis of micro-batches. Call it under
        `jax.jit`.
    """
    summed = accumulate_terms(checked(loss_fn))

    def accumulated(parameters, micro_batches, *rest):
        loss, count, figures, gradients = summed(parameters, micro_batches, *rest)
        return (loss, count, figures, gradients) if figures else (loss, count, gradients)

    return accumulated


def accumulate_terms(
    terms_of: Callable[..., Terms],
) -> Callable[..., tuple[jax.Array, jax.Array, Any, Any]]:
    """Like `accumulate`, with figures in addition to the loss.

    Args:
        terms_of: ``(parameters, micro_batch, *rest) -> Terms``.

    Returns:
        A function ``(parameters, micro_batches, *rest) -> (loss, count, figures, gradients)``.
    """

    def total_of(*arguments):
        total, count, figures = terms_of(*arguments)
        return total, (count, figures)

    value_and_grad = jax.value_and_grad(total_of, has_aux=True)

    def accumulated(parameters, micro_batches, *rest):
        def wide(x):
            return x.astype(accumulation_dtype(x.dtype))

        def one(inputs):
            (total, (count, figures)), gradients = value_and_grad(parameters, *inputs)
            return jax.tree.map(wide, (total, count.astype(jnp.float32), figures, gradients))

        def add(sums, inputs):
            return jax.tree.map(jnp.add, sums, one(inputs)), None

        inputs = (micro_batches, *rest)
        first = jax.tree.map(lambda x: x[0], inputs)
        if _micro_batch_count(inputs) == 1:
            sums = one(first)
        else:
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, first))
            sums, _ = jax.lax.scan(add, zeros, inputs)
        total, count, figures, gradients = sums
        divisor = jnp.maximum(count, jnp.ones((), count.dtype))

        def divide(x):
            return x / divisor.astype(x.dtype)

        return divide(total), count, *jax.tree.map(divide, (dict(figures), gradients))

    return accumulated


def _micro_batch_count(inputs) -> int:
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(inputs)}
    if len(sizes) != 1:
        raise ValueError(f"every leaf needs one leading axis of micro-batches, got sizes {sizes}")
    return sizes.pop()
