"""Linear layers: how they are made, and weights that training leaves alone."""

import dataclasses
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from lorax.layers.attention import AttentionImplementation

INITIAL_DEVIATION = 0.02


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a model computes.

    Attributes:
        dtype: Of activations and products; norms, angles and the softmax are float32.
        param_dtype: Of the stored weights.
        attn_impl: What runs attention.
    """

    dtype: DTypeLike
    param_dtype: DTypeLike
    attn_impl: AttentionImplementation


def make_linear(inputs: int, outputs: int, bias: bool, execution: Execution, rngs: nnx.Rngs) -> Any:
    """Returns a layer with normal weights and zero biases."""
    # Any, because it may be replaced by whatever is called like an nnx.Linear.
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        dtype=execution.dtype,
        param_dtype=execution.param_dtype,
        kernel_init=nnx.initializers.normal(INITIAL_DEVIATION),
        rngs=rngs,
    )


class Frozen(nnx.Variable):
    """A weight that training never changes. `nnx.Param` is what trains."""
