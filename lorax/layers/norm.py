"""The norm at the head of attention and of the MLP."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lorax.devices.mesh import ROW_AXES
from lorax.layers.linear import Execution
from lorax_kernels import Kernels, rms_norm, rms_norm_fork


class RMSNorm(nnx.Module):
    """``weight · x / √(mean(x²) + ε)``, the mean and the root in float32.

    Source: Zhang & Sennrich 2019, eq. 4, https://arxiv.org/abs/1910.07467
    """

    def __init__(self, size: int, epsilon: float, execution: Execution):
        self.weight = nnx.Param(jnp.ones((size,), execution.param_dtype))
        self.epsilon = epsilon
        self.dtype = execution.dtype
        self.kernels: Kernels = "auto"

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Returns `x` with unit mean square, times the weight."""
        return rms_norm(x.astype(self.dtype), self.weight[...].astype(self.dtype), self.epsilon)

    def fork(self, x: Float[Array, "*batch d"]) -> tuple[Array, Float[Array, "*batch d"]]:
        """Returns `x` and its norm, for a branch that is later added to `x`."""
        if isinstance(self.weight, nnx.Param) or x.dtype != self.dtype:  # a Param trains
            return x, self(x)
        weight = self.weight[...].astype(self.dtype)
        return rms_norm_fork(x, weight, self.epsilon, kernels=self.kernels, row_axes=ROW_AXES)
