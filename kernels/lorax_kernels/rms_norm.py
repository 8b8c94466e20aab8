"""The norm at the head of a residual branch, whose backward pass is one pass over memory.

`y = w · x / √(mean(x²) + ε)` opens a branch, and the residual stream takes `x` too, so that x's
gradient is a sum of two. With g = w·dy and i = 1/√(mean(x²) + ε), row by row::

    dx' = dx + i · (g − x · i² · mean(g·x))

XLA computes the two means in one pass over x and dy, and the sum in another; here each array is
read once. The kernel is written in Pallas's Triton, which JAX 0.11 calls deprecated: XLA runs where
a later JAX lacks it. The forward pass is XLA's: on NVIDIA GPUs one kernel that reads x and writes
y.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from lorax_kernels.device import is_interpreted
from lorax_kernels.dispatch import Kernels, axis_sizes, runs_row_kernels
from lorax_kernels.dtypes import accumulation_dtype

MAX_WIDTH = 16384  # a row is held in registers


def rms_norm(x: Float[Array, "*batch d"], weight: Float[Array, " d"], epsilon: float):
    """Returns ``weight · x / √(mean(x²) + ε)``: mean and root in float32 or wider, in `x`'s dtype.

    Source: Zhang & Sennrich 2019, eq. 4, https://arxiv.org/abs/1910.07467
    """
    wide = x.astype(accumulation_dtype(x.dtype))
    scale = jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + epsilon)
    return weight.reshape((1,) * (x.ndim - 1) + (-1,)) * (wide * scale).astype(x.dtype)


def rms_norm_fork(
    x: Float[Array, "*batch d"],
    weight: Float[Array, " d"],
    epsilon: float,
    *,
    kernels: Kernels = "auto",
    row_axes: Sequence[str] = (),
) -> tuple[Float[Array, "*batch d"], Float[Array, "*batch d"]]:
    """Returns `x` and its `rms_norm`; one backward kernel computes the sum of their gradients.

    Args:
        x: Input rows.
        weight: One factor per column, in `x`'s dtype, frozen: its gradient is zero.
        epsilon: Added to the mean.
        kernels: ``xla`` leaves the backward pass to XLA; else the kernel runs on Hopper GPUs where
            `x` is bfloat16 or float16, d is at most 16,384, and JAX has Pallas's Triton.
        row_axes: Mesh axes that divide the first dimension of `x`.

    Raises:
        ValueError: If `kernels` is no such name.
    """
    fits = 0 < x.size and x.shape[-1] <= MAX_WIDTH
    if not fits or not runs_row_kernels(x.shape[0], x.dtype, kernels, row_axes):
        return x, rms_norm(x, jax.lax.stop_gradient(weight), epsilon)
    fork = functools.partial(_fork, epsilon)
    if axes := axis_sizes(row_axes):
        rows = PartitionSpec(tuple(axes))
        fork = jax.shard_map(
            fork, in_specs=(rows, PartitionSpec()), out_specs=rows, check_vma=False
        )
    return fork(x, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fork(epsilon: float, x, weight):
    return x, rms_norm(x, weight, epsilon)


def _forward(epsilon: float, x, weight):
    # Its operations one by one, not `_fork`, so that a policy of jax.checkpoint sees them.
    return (x, rms_norm(x, weight, epsilon)), (x, weight)


def _backward(epsilon: float, residuals, gradients):
    x, weight = residuals
    return _add_gradients(epsilon, x, weight, *gradients), None


_fork.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnums=0)
def _add_gradients(epsilon: float, x, weight, dx, dy):
    """Returns the gradient of x, given those of its two uses."""
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.triton as triton

    d = x.shape[-1]
    width = pl.next_power_of_2(d)

    def flat(array):
        return array.reshape(-1, d)

    total = pl.pallas_call(
        functools.partial(_kernel, d=d, width=width, epsilon=epsilon),
        grid=(x.size // d,),
        out_shape=jax.ShapeDtypeStruct((x.size // d, d), x.dtype),
        compiler_params=triton.CompilerParams(num_warps=min(max(width // 512, 4), 32)),
        interpret=is_interpreted(),
        name="rms_norm_back",
    )(flat(x), weight, flat(dx), flat(dy))
    return total.reshape(x.shape)


def _kernel(x_ref, weight_ref, dx_ref, dy_ref, out_ref, *, d: int, width: int, epsilon: float):
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.triton as triton

    row = pl.program_id(0)
    columns = pl.ds(0, width)
    inside = jnp.arange(width) < d

    def read(ref, *at):
        return triton.load(ref.at[(*at, columns)], mask=inside, other=0.0).astype(jnp.float32)

    x = read(x_ref, row)
    g = read(dy_ref, row) * read(weight_ref)
    inverse = jax.lax.rsqrt(jnp.sum(x * x) / d + epsilon)
    share = jnp.sum(g * x) / d * inverse * inverse
    total = read(dx_ref, row) + inverse * (g - share * x)
    triton.store(out_ref.at[row, columns], total.astype(out_ref.dtype), mask=inside)
