"""The linear layer, x·W + b, with the adapters attached to it."""

import dataclasses
from typing import Any, override

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lorax.layers.attention import AttentionImplementation
from lorax.layers.carrier import Carrier, apply_adapted, compute_dtype
from lorax.layers.maps import Matmul
from lorax_kernels import Weight

INITIAL_DEVIATION = 0.02


@dataclasses.dataclass(frozen=True)
class Execution:
    """The dtypes and the attention of a model.

    Attributes:
        dtype: Of activations and products; norms, angles and the softmax are float32.
        param_dtype: Of the stored weights.
        attn_impl: What runs attention.
    """

    dtype: DTypeLike
    param_dtype: DTypeLike
    attn_impl: AttentionImplementation


class Linear(Carrier, nnx.Linear):
    """``x·W + b``, and what the active adapter makes of it; called like `nnx.Linear`.

    W is an array, or stored in another format.
    """

    flax_class = nnx.Linear

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs, **options: Any):
        nnx.Linear.__init__(self, in_features, out_features, rngs=rngs, **options)
        self.begin()

    @property
    def linear_map(self) -> Matmul:
        """See `Carrier`."""
        return Matmul((self.in_features,), (self.out_features,))

    @override
    def __call__(self, inputs: Float[Array, "*batch k"], out_sharding: Any = None):
        """Returns the layer's output, (…, n), in the dtype that `nnx.Linear` would give."""
        if self.computing is not None:
            return finish(self, apply_adapted(self, inputs))
        w = self.kernel.get_value()
        if isinstance(w, Weight):
            dtype = compute_dtype(self, inputs.dtype)
            return finish(self, inputs.astype(dtype) @ w.dense(dtype))
        return nnx.Linear.__call__(self, inputs, out_sharding)


def finish(
    layer: Linear, y: Float[Array, "*batch n"], *, has_bias: bool = False
) -> Float[Array, "*batch n"]:
    """Adds the bias to a product that has none yet, and gives the dtype that the layer promises."""
    if layer.bias is not None and not has_bias:
        y += layer.bias[...].astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
    wanted = layer.preferred_element_type
    return y if wanted is None else y.astype(wanted)


def promises(layer: Linear, dtype: DTypeLike, of_input: DTypeLike) -> bool:
    """Says whether outputs are computed, and come, in `dtype` for inputs of `of_input`."""
    wanted = jnp.dtype(layer.preferred_element_type or dtype)
    return {wanted, compute_dtype(layer, of_input)} == {jnp.dtype(dtype)}


def obstacle(linear: nnx.Linear) -> str | None:
    """Returns what an adapted `Linear` would not compute as `linear` does, or None."""
    if linear.dot_general is not jax.lax.dot_general or linear.promote_dtype is not promote_dtype:
        return "it has a dot_general or promote_dtype of its own"
    if linear.precision is not None:
        return f"it sets precision={linear.precision}; set jax_default_matmul_precision instead"
    return None


def is_plain(layer: Any) -> bool:
    """Says whether a layer computes ``x·W + b`` and nothing of its own."""
    calls = (nnx.Linear.__call__, Linear.__call__)
    if not isinstance(layer, Linear) or type(layer).__call__ not in calls:
        return False
    return obstacle(layer) is None and len(layer.kernel.get_value().shape) == 2


def make_linear(inputs: int, outputs: int, bias: bool, execution: Execution, rngs: nnx.Rngs) -> Any:
    """Returns a layer with normal weights and zero biases."""
    # Any, because it may be replaced by whatever is called like an nnx.Linear.
    return Linear(
        inputs,
        outputs,
        use_bias=bias,
        dtype=execution.dtype,
        param_dtype=execution.param_dtype,
        kernel_init=nnx.initializers.normal(INITIAL_DEVIATION),
        rngs=rngs,
    )
