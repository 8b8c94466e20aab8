"""The adapted linear layer: one alone, or several that read one input in one operation."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jaxtyping import Array, Float

from lorax.sharding import DATA_AXIS
from lorax.targets import Target
from lorax_kernels import (
    Kernels,
    LoraWeights,
    lora_linear,
    lora_linear_group,
    lora_swiglu,
    lora_swiglu_again,
)

ROW_AXES = (DATA_AXIS,)  # mesh axes that divide the rows of a batch


class Frozen(nnx.Variable):
    """A weight that training never changes. `nnx.Param` is what trains."""


class DropoutKey(nnx.Variable):
    """The key that decides one layer's dropout mask; None until `set_dropout_key`."""


class LoraLinear(nnx.Module):
    """A frozen linear layer plus a trainable low-rank update, ``x·W + b + scale · (x·A)·B``.

    A new layer computes exactly what its base computes, because `B` starts at zero. `A` is
    uniform in ±1/√in_features (``init_lora_weights=True``) or normal with deviation 1/r
    (``"gaussian"``). Both are float32 whatever the base is.

    Args:
        base: The layer to adapt. Its arrays are shared, the layer itself is not modified.
        target: Rank and scale of the update.
        dropout: Probability of zeroing an element of `x` on the update's path in training.
        init_lora_weights: How `A` is drawn.
        kernels: What computes: see `lorax_kernels.lora_linear` and `kernels_now`.
        rngs: Source of `A` (stream ``params``).

    Source: Hu et al. 2021, "LoRA", §4.1, https://arxiv.org/abs/2106.09685
    """

    def __init__(
        self,
        base: nnx.Linear,
        target: Target,
        *,
        dropout: float = 0.0,
        init_lora_weights: bool | str = True,
        kernels: Kernels = "auto",
        rngs: nnx.Rngs,
    ):
        self.in_features, self.out_features = base.in_features, base.out_features
        self.kernel = Frozen(base.kernel.get_value())
        self.bias = None if base.bias is None else Frozen(base.bias.get_value())
        self.dtype, self.preferred_element_type = base.dtype, base.preferred_element_type
        self.r, self.lora_alpha, self.scale = target.r, target.lora_alpha, target.scale
        shape, key = (base.in_features, target.r), rngs.params()
        if init_lora_weights == "gaussian":
            a = jax.random.normal(key, shape, jnp.float32) / target.r
        else:
            bound = base.in_features**-0.5
            a = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
        self.lora_a = nnx.LoRAParam(a)
        self.lora_b = nnx.LoRAParam(jnp.zeros((target.r, base.out_features), jnp.float32))
        self.dropout, self.deterministic, self.merged = dropout, False, False
        self.kernels: Kernels = kernels
        self.dropout_key = DropoutKey(None)

    def __call__(
        self, x: Float[Array, "*batch k"], again: Float[Array, "*batch k"] | None = None
    ) -> Float[Array, "*batch n"]:
        """Returns the adapted output, in the dtype that the base layer would give.

        Args:
            x: The input.
            again: The input by another route, for the backward pass: see `lora_linear`.
        """
        dtype = self.compute_dtype(x.dtype)
        x = x.astype(dtype)
        if self.merged:
            return _finish(self, x @ self.kernel[...].astype(dtype))
        rate = self.dropout_rate
        y = lora_linear(
            x,
            self.kernel[...],
            self.lora_a[...],
            self.lora_b[...],
            scale=self.scale,
            dropout_rate=rate,
            dropout_key=self._key() if rate else None,
            kernels=self.kernels_now,
            row_axes=ROW_AXES,
            again=None if again is None else again.astype(dtype),
        )
        return _finish(self, y)

    @property
    def dropout_rate(self) -> float:
        """Probability of dropping an input now: 0 unless training."""
        return 0.0 if self.deterministic else self.dropout

    @property
    def kernels_now(self) -> Kernels:
        """What computes now: where the choice is free, XLA unless training.

        The rows of evaluation and generation differ from call to call, and the kernels take longer
        to compile for each new number than they save.
        """
        return "xla" if self.kernels == "auto" and self.deterministic else self.kernels

    def compute_dtype(self, dtype):
        """Returns the dtype in which inputs of `dtype` are multiplied."""
        return self.dtype or jnp.promote_types(dtype, self.kernel.dtype)

    def apply_together(self, layers: Sequence[Any], x) -> list[Array]:
        """Returns the outputs of layers that read one input, of which this is one.

        They share one read of x, one launch where the kernel runs, and one dropout of x.
        """
        group = _group(layers, x)
        if group is None:
            return [layer(x) for layer in layers]
        members, options = group
        outputs = lora_linear_group(x.astype(self.compute_dtype(x.dtype)), members, **options)
        return [_finish(layer, y) for layer, y in zip(layers, outputs, strict=True)]

    def apply_swiglu(
        self, gate: nnx.Module, up: nnx.Module, x, *, again: bool = False
    ) -> tuple[Array, Array | None] | None:
        """Returns ``silu(gate(x)) · up(x)`` from one operation, or None if the layers forbid it.

        With `again`, returns beside it the same product made from gate(x) and up(x), for the
        backward pass of the layer that reads it.
        """
        group = _group((gate, up), x)
        extras = ("bias", "preferred_element_type")
        plain = all(getattr(layer, name, None) is None for layer in (gate, up) for name in extras)
        if group is None or not plain:
            return None
        members, options = group
        x = x.astype(self.compute_dtype(x.dtype))
        if again:
            return lora_swiglu_again(x, *members, **options)
        return lora_swiglu(x, *members, **options), None

    def _key(self):
        key = self.dropout_key.get_value()
        if key is None:
            raise ValueError(
                "lora_dropout needs a fresh key every step: train with lorax.make_train_step, call "
                "lorax.set_dropout_key(model, key) in your own loop, or model.eval() to turn it off"
            )
        return key

    def update(self) -> Float[Array, "k n"]:
        """Returns ``scale · A·B`` in float32."""
        a, b = self.lora_a[...], self.lora_b[...]
        return jnp.dot(a, b, precision="highest") * jnp.float32(self.scale)

    def merged_kernel(self) -> Float[Array, "k n"]:
        """Returns ``W + scale · A·B``, summed in float32 and rounded once to `W`'s dtype."""
        kernel = self.kernel[...]
        if self.merged:
            return kernel
        return (kernel.astype(jnp.float32) + self.update()).astype(kernel.dtype)


def _group(layers: Sequence[Any], x) -> tuple[list[LoraWeights], dict[str, Any]] | None:
    """Returns the operands and options of one call for all layers, or None if they differ.

    Plain layers take part while they are frozen: the operation gives no gradient of a base weight.
    """
    members, adapted = [], [layer for layer in layers if isinstance(layer, LoraLinear)]
    for layer in layers:
        if isinstance(layer, LoraLinear) and not layer.merged:
            a, b = layer.lora_a[...], layer.lora_b[...]
            members.append(LoraWeights(layer.kernel[...], a, b, scale=layer.scale))
        elif is_adaptable(layer) and isinstance(layer.kernel, Frozen):
            members.append(LoraWeights(layer.kernel.get_value()))
        else:
            return None
    first = adapted[0]
    ways = {(layer.dropout_rate, layer.kernels_now) for layer in adapted}
    dtypes = {
        jnp.dtype(layer.dtype or jnp.promote_types(x.dtype, member.w.dtype))
        for layer, member in zip(layers, members, strict=True)
    }
    if len(ways) > 1 or len(dtypes) > 1:
        return None
    rate = first.dropout_rate
    key = first._key() if rate else None
    return members, {
        "dropout_rate": rate,
        "dropout_key": key,
        "kernels": first.kernels_now,
        "row_axes": ROW_AXES,
    }


def _finish(layer: Any, y: Array) -> Array:
    """Adds the bias of an adapted or plain layer and gives the dtype that it promises."""
    if layer.bias is not None:
        y += layer.bias[...].astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
    wanted = layer.preferred_element_type
    return y if wanted is None else y.astype(wanted)


def is_adaptable(module: nnx.Module) -> bool:
    """Says whether `module` is a plain linear layer, with nothing of its own in `__call__`."""
    return isinstance(module, nnx.Linear) and obstacle(module) is None


def obstacle(linear: nnx.Linear) -> str | None:
    """Returns what an adapted layer would not carry over from `linear`, or None."""
    if type(linear).__call__ is not nnx.Linear.__call__:
        return "it has a __call__ of its own"
    if linear.dot_general is not jax.lax.dot_general or linear.promote_dtype is not promote_dtype:
        return "it has a dot_general or promote_dtype of its own"
    if linear.precision is not None:
        return f"it sets precision={linear.precision}; set jax_default_matmul_precision instead"
    if linear.kernel.ndim != 2:
        return f"its kernel has shape {linear.kernel.shape}, of several layers at once"
    return None
