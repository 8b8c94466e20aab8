"""The linear layer, x·W + b and the adapters attached to it; weights that training leaves alone."""

import dataclasses
from typing import Any, Protocol, override

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from lorax.devices.mesh import ROW_AXES
from lorax.layers.attention import AttentionImplementation
from lorax_kernels import Kernels, LoraWeights, Matrix, Weight, lora_linear

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


class Frozen(nnx.Variable):
    """A weight that training never changes. `nnx.Param` is what trains."""


class Update(Protocol):
    """The update that an adapter adds to its layer."""

    @property
    def dropout(self) -> float:
        """Probability with which an element of the adapter's input is dropped in training."""
        ...

    def key(self) -> Key[Array, ""]:
        """Returns the key that decides the dropout mask.

        Raises:
            ValueError: If none was set.
        """
        ...

    def operands(self, w: Matrix) -> LoraWeights | None:
        """Returns what the kernels take for W and its update; None if `apply` is all there is."""
        ...

    def apply(
        self, x: Float[Array, "*batch k"], w: Matrix, rate: float
    ) -> Float[Array, "*batch n"]:
        """Returns x·W and what the adapter makes of it, in `x`'s dtype; `rate` is the dropout's."""
        ...


class Linear(nnx.Linear):
    """``x·W + b``, and what the active adapter makes of it; called like `nnx.Linear`.

    *Adapted* is a state of the layer. Without an active adapter it computes what `nnx.Linear` does.

    W is an array, or stored in another format. What computes with a layer is a function
    and no method, because `nnx.tabulate` traces every method and accepts arrays only.

    Attributes:
        attached: The adapters by name.
        active: Name of the one that computes; None: the layer is its base.
        merged: Whether the kernel holds the active adapter's update already.
        kernels: What computes an adapted layer: see `lorax_kernels.lora_linear`.
        deterministic: Whether dropout is off; `model.train()` and `model.eval()` set it.
    """

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs, **options: Any):
        super().__init__(in_features, out_features, rngs=rngs, **options)
        self.attached = nnx.Dict()
        self.active: str | None = None
        self.merged = False
        self.deterministic = False
        self.kernels: Kernels = "auto"

    @classmethod
    def of(cls, base: nnx.Linear) -> "Linear":
        """Returns a layer like `base`, which shares its variables."""
        layer = nnx.eval_shape(
            lambda: cls(
                base.in_features,
                base.out_features,
                use_bias=base.bias is not None,
                dtype=base.dtype,
                param_dtype=base.param_dtype,
                preferred_element_type=base.preferred_element_type,
                rngs=nnx.Rngs(0),
            )
        )
        layer.kernel = base.kernel
        layer.bias = base.bias
        return layer

    def freeze(self, kernel: Matrix) -> None:
        """Gives the layer a kernel, which training leaves alone."""
        self.kernel: Any = Frozen(kernel)

    @property
    def adapter(self) -> Any:
        """The active adapter, or None; merged or not."""
        return None if self.active is None else self.attached[self.active]

    @property
    def computing(self) -> Update | None:
        """The update that takes part in a call now, or None."""
        return None if self.merged or self.adapter is None else self.adapter.update

    @property
    def dropout_rate(self) -> float:
        """Probability of dropping an element of the adapter's input now: 0 unless training."""
        adapter = self.computing
        return 0.0 if adapter is None or self.deterministic else adapter.dropout

    @property
    def kernels_now(self) -> Kernels:
        """The kernels for this call: with `auto`, XLA unless training.

        The shapes of evaluation and generation change from call to call, and compiling a kernel for
        each new shape costs more than it saves.
        """
        return "xla" if self.kernels == "auto" and self.deterministic else self.kernels

    @override
    def __call__(self, inputs: Float[Array, "*batch k"], out_sharding: Any = None):
        """Returns the layer's output, (…, n), in the dtype that `nnx.Linear` would give."""
        if self.computing is not None:
            return add(self, inputs, None)
        w = self.kernel.get_value()
        if isinstance(w, Weight):
            dtype = compute_dtype(self, inputs.dtype)
            return finish(self, inputs.astype(dtype) @ w.dense(dtype))
        return super().__call__(inputs, out_sharding)


def compute_dtype(layer: Linear, dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype in which inputs of `dtype` are multiplied."""
    return jnp.dtype(layer.dtype or jnp.promote_types(dtype, layer.kernel.get_value().dtype))


def add(layer: Linear, x: Float[Array, "*batch k"], residual: Float[Array, "*batch n"] | None):
    """Returns the adapted output, (…, n), plus the residual if there is one.

    A residual needs the dtype in which outputs are computed and come.
    """
    adapter = layer.computing
    rate = layer.dropout_rate
    assert adapter is not None
    x = x.astype(compute_dtype(layer, x.dtype))
    w = layer.kernel.get_value()
    operands = adapter.operands(w)
    if operands is None:
        if layer.kernels_now == "pallas":
            raise ValueError(
                "kernels is pallas, but no kernel computes this adapter's method; use auto or xla"
            )
        y = adapter.apply(x, w, rate)
        return finish(layer, y if residual is None else residual + y)
    assert operands.a is not None and operands.b is not None
    y = lora_linear(
        x,
        operands.w,
        operands.a,
        operands.b,
        scale=operands.scale,
        bias=operands.bias,
        residual=residual,
        dropout_rate=rate,
        dropout_key=adapter.key() if rate else None,
        kernels=layer.kernels_now,
        row_axes=ROW_AXES,
    )
    return finish(layer, y)


def finish(layer: Linear, y: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    """Adds the bias to a product, and gives the dtype that the layer promises."""
    if layer.bias is not None:
        y += layer.bias[...].astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
    wanted = layer.preferred_element_type
    return y if wanted is None else y.astype(wanted)


def promises(layer: Linear, dtype: DTypeLike, of_input: DTypeLike) -> bool:
    """Says whether outputs are computed, and come, in `dtype` for inputs of `of_input`."""
    wanted = jnp.dtype(layer.preferred_element_type or dtype)
    return {wanted, compute_dtype(layer, of_input)} == {jnp.dtype(dtype)}


def obstacle(linear: nnx.Linear) -> str | None:
    """Returns what a `Linear` would not carry over from `linear`, or None."""
    if type(linear).__call__ not in (nnx.Linear.__call__, Linear.__call__):
        return "it has a __call__ of its own"
    if linear.dot_general is not jax.lax.dot_general or linear.promote_dtype is not promote_dtype:
        return "it has a dot_general or promote_dtype of its own"
    if linear.precision is not None:
        return f"it sets precision={linear.precision}; set jax_default_matmul_precision instead"
    if len(shape := linear.kernel.get_value().shape) != 2:
        return f"its kernel has shape {shape}, of several layers at once"
    return None


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
