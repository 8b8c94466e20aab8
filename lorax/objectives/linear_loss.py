"""Output head and loss in one operation, over chunks of logits."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lorax.devices.mesh import ROW_AXES, refuse_explicit_axes
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


def linear_cross_entropy(
    head: nnx.Module,
    hidden: Float[Array, "b t d"],
    labels: Int[Array, "b t"],
    *,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    kernels: Kernels = "auto",
) -> Float[Array, ""]:
    """Returns the sum of `token_nll` over ``head(hidden)``, whose logits never exist as a whole.

    The logits are computed chunk by chunk along the sequence, at most `LOGIT_CHUNK_BYTES` of them
    at a time. Under differentiation each chunk's gradient is computed while its logits exist: for
    `hidden`, and for the trainable parameters of `head`. So the backward pass does not recompute
    the head's matmul. The gradient takes the dtype of `hidden` before it is scaled: scaling the
    loss does not save float16 gradients from underflow.

    Args:
        head: Called like a linear layer; its `nnx.Param` variables get gradients.
        hidden: Its input.
        labels: The id of each position's next token (shifted already), or `IGNORED`, -100. Any
            other number makes the loss NaN.
        soft_cap: As in `token_nll`.
        z_loss: As in `token_nll`.
        kernels: As in `token_nll_and_gradient`.

    Raises:
        ValueError: If shapes disagree, axes of the mesh are Explicit, labels are no integers, a
            setting has the wrong sign, or `kernels` is no such name.
    """
    refuse_explicit_axes(hidden)
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
        # repeat the first one's mask.
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
        def scale(leaf, like):
            return (leaf.astype(zero.dtype) * cotangent).astype(like.dtype)

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
    """Returns (number, length) of the chunks: as few as the budget allows, all of one length.

    They are twice as long where the gradient is written over the logits (`in_place`).
    """
    most = max(1, LOGIT_CHUNK_BYTES // ((2 if in_place else 4) * rows * vocabulary))
    chunks = max(1, -(-length // most))
    return chunks, -(-length // chunks)
