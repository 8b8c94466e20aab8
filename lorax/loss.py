"""Token-normalised loss: sums and counts per micro-batch, divided once per optimizer step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

IGNORED = -100
"""The label of a position without supervision, as in Hugging Face's data."""

LOGIT_CHUNK_BYTES = 512 * 2**20
"""At most this many bytes of float32 logits exist at a time."""

type Batch = dict[str, Any]
type LossFunction = Callable[[nnx.Module, Batch], tuple[jax.Array, jax.Array]]


def token_nll(
    logits: Float[Array, "*batch v"], labels: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Returns ``logsumexp(logits) - logits[label]`` per token, in float32; 0 where ignored."""
    logits = logits.astype(_wide(logits.dtype))
    supervised = labels != IGNORED
    picked = jnp.take_along_axis(logits, jnp.where(supervised, labels, 0)[..., None], axis=-1)
    nll = jax.nn.logsumexp(logits, axis=-1) - picked[..., 0]
    return jnp.where(supervised, nll, jnp.zeros((), nll.dtype))


def _wide(dtype) -> type:
    """Returns the dtype of sums: float32, or float64 for float64."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def causal_lm_loss(model: Any, batch: Batch) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Returns (Σ nll, supervised tokens) of a micro-batch under one of `lorax.models`.

    The logits are made, used and forgotten chunk by chunk along the sequence, in the backward
    pass again, so that rows × sequence × vocabulary never stands in memory.

    Args:
        model: A `lorax.models.CausalLM`.
        batch: ``input_ids``, ``labels`` (already shifted: the label at t is token t + 1, or
            `IGNORED`), ``positions`` and, when packed, ``segment_ids``, each rows × sequence.
    """
    labels = batch["labels"]
    hidden = model.hidden_states(
        batch["input_ids"], batch.get("positions"), batch.get("segment_ids")
    )
    rows, length = labels.shape
    chunk = _chunk_length(rows, length, model.config.vocab_size)

    def add_chunk(total, inputs):
        head, states, targets = model.logits, *inputs
        return total + token_nll(head(states), targets).sum(), None

    split = lambda x: jnp.moveaxis(x.reshape(rows, length // chunk, chunk, *x.shape[2:]), 1, 0)
    zero = jnp.zeros((), _wide(hidden.dtype))
    if chunk == length:
        total, _ = add_chunk(zero, (hidden, labels))
    else:
        total, _ = jax.lax.scan(jax.checkpoint(add_chunk), zero, (split(hidden), split(labels)))
    return total, (labels != IGNORED).sum()


def _chunk_length(rows: int, length: int, vocabulary: int) -> int:
    """Returns the longest divisor of `length` whose logits keep to the budget."""
    budget = max(1, LOGIT_CHUNK_BYTES // (4 * rows * vocabulary))
    return max(d for d in range(1, length + 1) if length % d == 0 and (d <= budget or d == 1))


def accumulate(
    loss_fn: Callable[..., tuple[jax.Array, jax.Array]],
) -> Callable[..., tuple[jax.Array, jax.Array, Any]]:
    """Turns a summed loss into the exact loss and gradient of many micro-batches.

    With Lᵢ and nᵢ the sum and the count of micro-batch i, the result is that of one large batch::

        N = Σ nᵢ        loss = Σ Lᵢ / N        gradient = Σ ∇Lᵢ / N

    Sums are float32 (float64 for float64 parameters) and divided once. A micro-batch with count 0
    contributes nothing. The mean of micro-batch means, which `optax.MultiSteps` takes, differs as
    soon as the counts do.

    Args:
        loss_fn: ``(parameters, micro_batch, *rest) -> (sum of losses, count)``; it must return
            the sum, not the mean.

    Returns:
        A function ``(parameters, micro_batches, *rest) -> (loss, count, gradients)``, where each
        leaf of `micro_batches` and `rest` has a leading axis of micro-batches. Call it under
        `jax.jit`.
    """
    value_and_grad = jax.value_and_grad(_checked(loss_fn), has_aux=True)

    def accumulated(parameters, micro_batches, *rest):
        wide = lambda x: x.astype(_wide(x.dtype))

        def one(inputs):
            (total, count), gradients = value_and_grad(parameters, *inputs)
            return jax.tree.map(wide, (total, count.astype(jnp.float32), gradients))

        def add(sums, inputs):
            return jax.tree.map(jnp.add, sums, one(inputs)), None

        inputs = (micro_batches, *rest)
        first = jax.tree.map(lambda x: x[0], inputs)
        if _micro_batch_count(inputs) == 1:
            sums = one(first)
        else:
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, first))
            sums, _ = jax.lax.scan(add, zeros, inputs)
        total, count, gradients = sums
        divisor = jnp.maximum(count, jnp.ones((), count.dtype))
        divide = lambda x: x / divisor.astype(x.dtype)
        return divide(total), count, jax.tree.map(divide, gradients)

    return accumulated


def _checked(loss_fn):
    """Holds a loss to its contract, in words instead of a tracer's error."""

    def checked(*arguments):
        found = loss_fn(*arguments)
        if isinstance(found, tuple) and len(found) == 2:
            total, count = map(jnp.asarray, found)
            if total.shape == count.shape == ():
                return total, count
        raise ValueError(
            "loss_fn must return (sum of losses, count), two scalars, so that micro-batches can be "
            f"weighted exactly: `return (nll * mask).sum(), mask.sum()`; got {found}"
        )

    return checked


def _micro_batch_count(inputs) -> int:
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(inputs)}
    if len(sizes) != 1:
        raise ValueError(f"every leaf needs one leading axis of micro-batches, got sizes {sizes}")
    return sizes.pop()
