"""Cross-entropy of a language model's logits, with its gradient, which overwrites the logits.

With l the logits of a token, or ``soft_cap·tanh(logits / soft_cap)``, and lse = logsumexp(l)::

    nll = lse - l[label] + z·lse²        d nll / d l = softmax(l)·(1 + 2·z·lse) - onehot(label)

XLA reads the logits three times for both, and writes the gradient to new memory. The kernel reads a
row of logits twice and writes the gradient over it. It is written in Pallas's Triton: see
`rms_norm`.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from lorax_kernels.device import is_interpreted
from lorax_kernels.dispatch import Kernels, axis_sizes, runs_row_kernels
from lorax_kernels.dtypes import accumulation_dtype

IGNORED = -100
"""The label of a position without supervision, as in Hugging Face's data."""

BLOCK = 8192  # columns at a time; a thread works on sixteen and prefetches the next sixteen


def token_nll(
    logits: Float[Array, "*batch v"],
    labels: Int[Array, "*batch"],
    *,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
) -> Float[Array, "*batch"]:
    """Returns ``lse - l[label] + z_loss·lse²`` per token, with ``lse = logsumexp(l)``.

    In float32; 0 where the label is `IGNORED`, NaN where it is no token's id.

    Args:
        logits: Scores; l is ``soft_cap·tanh(logits / soft_cap)`` with a cap, else the scores.
        labels: The next tokens' ids.
        soft_cap: Bound of the scores' size.
        z_loss: Weight of the squared normaliser.

    Source: z-loss: Chowdhery et al. 2022, PaLM, §5, https://arxiv.org/abs/2204.02311; soft cap:
    Gemma Team 2024, Gemma 2, §2, https://arxiv.org/abs/2408.00118
    """
    labels = labels.astype(jnp.int32)
    capped, lse, _, weight = _scores(logits, labels, soft_cap)
    chosen = jnp.where(_is_label(capped, labels), capped, 0).sum(axis=-1)
    return _where_supervised(weight, lse - chosen + z_loss * jnp.square(lse))


def token_nll_and_gradient(
    logits: Float[Array, "*batch v"],
    labels: Int[Array, "*batch"],
    *,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    kernels: Kernels = "auto",
    row_axes: Sequence[str] = (),
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch v"]]:
    """Returns `token_nll`, and the gradient of its sum in the dtype of `logits`.

    Args:
        logits: As in `token_nll`.
        labels: As in `token_nll`.
        soft_cap: As in `token_nll`.
        z_loss: As in `token_nll`.
        kernels: ``xla`` leaves it to XLA; else the kernel runs where `runs_row_kernels` is true.
        row_axes: Mesh axes that divide the first dimension.

    Raises:
        ValueError: If `kernels` is no such name.
    """
    labels = labels.astype(jnp.int32)
    if not runs_row_kernels(logits.shape[0], logits.dtype, kernels, row_axes):
        options = {"soft_cap": soft_cap, "z_loss": z_loss}
        nll = token_nll(logits, labels, **options)
        return nll, _gradient(logits, labels, **options)
    soft_cap = None if soft_cap is None else float(soft_cap)
    function = functools.partial(_nll_and_gradient, soft_cap, float(z_loss))
    if axes := axis_sizes(row_axes):
        rows = PartitionSpec(tuple(axes))
        function = jax.shard_map(function, in_specs=rows, out_specs=rows, check_vma=False)
    return function(logits, labels)


def _scores(logits, labels, soft_cap: float | None):
    """Returns the capped scores, their logsumexp, the cap's slope, and each token's weight."""
    wide = logits.astype(accumulation_dtype(logits.dtype))
    slope = None
    if soft_cap is not None:
        bent = jnp.tanh(wide / soft_cap)
        wide = soft_cap * bent
        slope = 1.0 - jnp.square(bent)
    weight = _weight(labels, logits.shape[-1], wide.dtype)
    return wide, jax.nn.logsumexp(wide, axis=-1), slope, weight


def _weight(labels, vocabulary: int, dtype):
    valid = (labels >= 0) & (labels < vocabulary)
    nan = jnp.asarray(jnp.nan, dtype)
    return jnp.where(labels == IGNORED, 0, jnp.where(valid, 1, nan)).astype(dtype)


def _is_label(scores, labels):
    # Comparing keeps to one pass over the scores; gathering would be another, and its gradient a
    # scatter into as many zeros.
    return (
        jax.lax.broadcasted_iota(labels.dtype, scores.shape, scores.ndim - 1) == labels[..., None]
    )


def _where_supervised(weight, values):
    return jnp.where(weight == 0, 0, weight * values).astype(values.dtype)


def _gradient(logits, labels, *, soft_cap: float | None, z_loss: float):
    scores, lse, slope, weight = _scores(logits, labels, soft_cap)
    lse = lse[..., None]
    weight = weight[..., None]
    gradient = jnp.exp(scores - lse) * (1.0 + 2.0 * z_loss * lse)
    gradient -= _is_label(scores, labels).astype(gradient.dtype)
    if slope is not None:
        gradient *= slope
    return _where_supervised(weight, gradient).astype(logits.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _nll_and_gradient(soft_cap: float | None, z_loss: float, logits, labels):
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.triton as triton

    *batch, v = logits.shape
    rows = labels.size
    block = min(BLOCK, pl.next_power_of_2(v))
    kernel = functools.partial(_kernel, v=v, block=block, soft_cap=soft_cap, z_loss=z_loss)
    if not rows:
        return jnp.zeros(batch, jnp.float32), logits
    gradient, nll = pl.pallas_call(
        kernel,
        grid=(rows,),
        out_shape=[
            jax.ShapeDtypeStruct((rows, v), logits.dtype),
            jax.ShapeDtypeStruct((rows,), jnp.float32),
        ],
        input_output_aliases={0: 0},
        compiler_params=triton.CompilerParams(num_warps=max(block // 512, 4)),
        interpret=is_interpreted(),
        name="cross_entropy",
    )(logits.reshape(rows, v), labels.reshape(rows))
    return nll.reshape(batch), gradient.reshape(logits.shape)


def _kernel(logits_ref, labels_ref, out_ref, nll_ref, *, v: int, block: int, soft_cap, z_loss):
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.triton as triton

    row = pl.program_id(0)
    lanes = jnp.arange(block)
    label = triton.load(labels_ref.at[row])
    weight = _weight(label, v, jnp.float32)

    def load(i):
        at = logits_ref.at[row, pl.ds(i * block, block)]
        return triton.load(at, mask=i * block + lanes < v, other=0.0)

    def score(logits):
        """Returns the capped scores, and the cap's slope."""
        scores = logits.astype(jnp.float32)
        if soft_cap is None:
            return scores, None
        bent = jnp.tanh(scores / soft_cap)
        return soft_cap * bent, 1.0 - bent * bent

    def walk(body, carry):
        """Runs ``body(block's number, its logits, carry)``; prefetches the next block."""

        def step(i, state):
            logits, carry = state
            return load(i + 1), body(i, logits, carry)

        # JAX refuses constant slices beyond an array, even masked ones: this 0 is no constant.
        first = load(jnp.minimum(row, 0))
        return jax.lax.fori_loop(0, pl.cdiv(v, block), step, (first, carry))[1]

    def add(i, logits, sums):
        most, total = sums
        scores = jnp.where(i * block + lanes < v, score(logits)[0], -jnp.inf)
        new = jnp.maximum(most, jnp.max(scores))
        return new, total * jnp.exp(most - new) + jnp.sum(jnp.exp(scores - new))

    # Read before the sums, where all threads synchronise: later another may have written there.
    chosen, _ = score(triton.load(logits_ref.at[row, jnp.clip(label, 0, v - 1)]))
    # The lowest finite number: a block without possible tokens must not give inf - inf.
    lowest = jnp.float32(jnp.finfo(jnp.float32).min)
    most, total = walk(add, (lowest, jnp.float32(0.0)))
    lse = most + jnp.log(total)
    nll = _where_supervised(weight, lse - chosen + z_loss * lse * lse)
    triton.store(nll_ref.at[row], nll)
    factor = weight * (1.0 + 2.0 * z_loss * lse)

    def write(i, logits, _):
        scores, slope = score(logits)
        columns = i * block + lanes
        gradient = jnp.exp(scores - lse) * factor - jnp.where(columns == label, weight, 0.0)
        if slope is not None:
            gradient *= slope
        gradient = jnp.where(weight == 0, 0.0, gradient).astype(out_ref.dtype)
        triton.store(out_ref.at[row, pl.ds(i * block, block)], gradient, mask=columns < v)

    walk(write, None)
