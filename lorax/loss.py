"""Token-normalised loss: sums and counts per micro-batch, divided once per optimizer step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lorax.devices.mesh import ROW_AXES
from lorax_kernels import (
    IGNORED,
    Kernels,
    accumulation_dtype,
    runs_row_kernels,
    token_nll,
    token_nll_and_gradient,
)

LOGIT_CHUNK_BYTES = 256 * 2**20
"""At most this many bytes of logits and their gradient exist at a time in half precision, twice as
many in float32."""

type Batch = dict[str, Any]
type LossFunction = Callable[[nnx.Module, Batch], tuple[jax.Array, jax.Array]]


def linear_cross_entropy(
    head: nnx.Module,
    hidden: Float[Array, "b t d"],
    labels: Int[Array, "b t"],
    *,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    kernels: Kernels = "auto",
) -> Float[Array, ""]:
    """Returns the sum of `token_nll` over ``head(hidden)``, which never stands in memory whole.

    The logits are made and used chunk by chunk along the sequence, at most `LOGIT_CHUNK_BYTES` of
    them at a time. Where a gradient is wanted, each chunk's is made while its logits are there:
    for `hidden`, and for what trains in `head`. So the head's product runs once, not again in the
    backward pass. The gradient takes the dtype of `hidden` before it is scaled: scaling the loss
    does not save float16 gradients from underflow.

    Args:
        head: Called like a linear layer; its `nnx.Param` variables get gradients.
        hidden: What it is called with.
        labels: The id of each position's next token (shifted already), or `IGNORED`, -100. Any
            other number makes the loss NaN.
        soft_cap: As in `token_nll`.
        z_loss: As in `token_nll`.
        kernels: As in `token_nll_and_gradient`.

    Raises:
        ValueError: If shapes disagree, labels are no integers, a setting has the wrong sign, or
            `kernels` is no such name.
    """
    if hidden.ndim != 3 or labels.shape != hidden.shape[:2]:
        got = f"{hidden.shape} and {labels.shape}"
        raise ValueError(f"need hidden (b, t, d) and labels (b, t), got {got}")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels are token ids, got {labels.dtype}")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap must be positive or None, got {soft_cap}")
    if z_loss < 0:
        raise ValueError(f"z_loss must not be negative, got {z_loss}")
    graph, trainable, rest = nnx.split(head, nnx.Param, ...)
    labels, length = labels.astype(jnp.int32), labels.shape[1]
    zero = jnp.zeros((), accumulation_dtype(hidden.dtype))

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, chunks * chunk - length)) + ((0, 0),) * (x.ndim - 2),
                    constant_values=IGNORED if x.ndim == 2 else 0)  # fmt: skip
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, chunk, *x.shape[2:]), 1, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], chunks * chunk, *x.shape[3:])[:, :length]

    def logits_of(trainable, rest, states, index=0):
        # Dropout in the head numbers its rows from 0: without a key of its own each chunk would
        # draw the first one's mask again.
        rest = jax.tree.map(
            lambda leaf: jax.random.fold_in(leaf, index) if _is_key(leaf) else leaf, rest
        )
        return nnx.merge(graph, trainable, rest)(states)

    logits = jax.eval_shape(logits_of, trainable, rest, hidden)
    in_place = runs_row_kernels(logits.shape[0], logits.dtype, kernels, ROW_AXES)
    chunks, chunk = logit_chunks(labels.shape[0], length, logits.shape[-1], in_place)
    options: dict[str, Any] = {"soft_cap": soft_cap, "z_loss": z_loss}

    @jax.custom_vjp
    def loss(trainable, rest, hidden, labels):
        def add(total, inputs):
            states, targets, index = inputs
            logits = logits_of(trainable, rest, states, index)
            return total + token_nll(logits, targets, **options).sum(), None

        return _scan(add, zero, (split(hidden), split(labels), jnp.arange(chunks)))[0]

    def forward(trainable, rest, hidden, labels):
        def add(sums, inputs):
            states, targets, index = inputs
            logits, pull = jax.vjp(lambda t, s: logits_of(t, rest, s, index), trainable, states)
            nll, of_logits = token_nll_and_gradient(
                logits, targets, kernels=kernels, row_axes=ROW_AXES, **options
            )
            of_head, of_states = pull(of_logits)
            total, of_head_so_far = sums
            of_head = jax.tree.map(lambda p, q: p + q.astype(p.dtype), of_head_so_far, of_head)
            return (total + nll.sum(), of_head), of_states

        start = (
            zero,
            jax.tree.map(lambda x: jnp.zeros(x.shape, accumulation_dtype(x.dtype)), trainable),
        )
        inputs = split(hidden), split(labels), jnp.arange(chunks)
        (total, of_head), of_hidden = _scan(add, start, inputs)
        return total, (of_head, join(of_hidden))

    def backward(gradients, cotangent):
        scale = lambda leaf, like: (leaf.astype(zero.dtype) * cotangent).astype(like.dtype)
        of_head, of_hidden = gradients
        of_head = jax.tree.map(scale, of_head, trainable)
        return of_head, None, scale(of_hidden, hidden), None

    loss.defvjp(forward, backward)
    return loss(trainable, rest, hidden, labels)


def _is_key(leaf) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _scan(body, carry, inputs):
    """Runs `jax.lax.scan`, or the body alone if there is one chunk."""
    if jax.tree.leaves(inputs)[0].shape[0] > 1:
        return jax.lax.scan(body, carry, inputs)
    carry, output = body(carry, jax.tree.map(lambda x: x[0], inputs))
    return carry, jax.tree.map(lambda x: x[None], output)


def logit_chunks(
    rows: int, length: int, vocabulary: int, in_place: bool = False
) -> tuple[int, int]:
    """Returns (number, length) of the chunks: as few as keep to the budget, all the same.

    They are twice as long where the gradient is written over the logits (`in_place`).
    """
    most = max(1, LOGIT_CHUNK_BYTES // ((2 if in_place else 4) * rows * vocabulary))
    chunks = max(1, -(-length // most))
    return chunks, -(-length // chunks)


def causal_lm_loss(model: Any, batch: Batch) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Returns (Σ nll, supervised tokens) of a micro-batch under one of `lorax.models`.

    Args:
        model: A `lorax.models.decoder.CausalLM`.
        batch: ``input_ids``, ``labels`` (already shifted: the label at t is token t + 1, or
            `IGNORED`), ``positions`` and, when packed, ``segment_ids``, each rows × sequence; and
            ``inputs_embeds``, rows × sequence × d, where the model's embedding is not to be read.
    """
    labels = batch["labels"]
    hidden = model.hidden_states(
        batch["input_ids"],
        batch.get("positions"),
        batch.get("segment_ids"),
        inputs_embeds=batch.get("inputs_embeds"),
    )
    loss = linear_cross_entropy(
        model.lm_head, hidden, labels, kernels=getattr(model, "kernels", "auto")
    )
    return loss, (labels != IGNORED).sum()


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
        wide = lambda x: x.astype(accumulation_dtype(x.dtype))

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
