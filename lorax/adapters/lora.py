"""LoRA: the adapted linear layer, alone or with others that read one input."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lorax.adapters.sites import is_adaptable
from lorax.adapters.targets import Target
from lorax.devices.mesh import ROW_AXES
from lorax.layers.linear import Frozen
from lorax_kernels import (
    Kernels,
    LoraWeights,
    lora_linear,
    lora_linear_group,
    lora_mlp,
    lora_swiglu,
)


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

    def __call__(self, x: Float[Array, "*batch k"]) -> Float[Array, "*batch n"]:
        """Returns the adapted output, in the dtype that the base layer would give."""
        return self._apply(x, None)

    def apply_added(self, x, residual: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
        """Returns ``residual + self(x)``, in one operation if they have one dtype."""
        if self.merged or not self._promises(residual.dtype, x.dtype):
            return residual + self(x)
        return self._apply(x, residual)

    def _promises(self, dtype, of_input) -> bool:
        """Says whether outputs are computed, and come, in `dtype`."""
        wanted = self.preferred_element_type or dtype
        return {jnp.dtype(wanted), jnp.dtype(self.compute_dtype(of_input))} == {jnp.dtype(dtype)}

    def _apply(self, x, residual):
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
            residual=residual,
            dropout_rate=rate,
            dropout_key=self._key() if rate else None,
            kernels=self.kernels_now,
            row_axes=ROW_AXES,
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
        group = self._group(layers, x.dtype)
        if group is None:
            return [layer(x) for layer in layers]
        options = self._options(dropout_key=group.key)
        outputs = lora_linear_group(x.astype(group.dtype), group.members, **options)
        return [_finish(layer, y) for layer, y in zip(layers, outputs, strict=True)]

    def apply_mlp(
        self, gate: Any, up: Any, down: Any, x, residual: Array, repeated: bool
    ) -> Array | None:
        """Returns ``residual + down(silu(gate(x)) · up(x))``, of which this is one layer.

        None if gate and up cannot run as one operation. See `lorax_kernels.lora_mlp` for
        `repeated`.
        """
        pair = self._group((gate, up), x.dtype)
        extras = ("bias", "preferred_element_type")
        plain = all(getattr(layer, name, None) is None for layer in (gate, up) for name in extras)
        if pair is None or not plain:
            return None
        x, single = x.astype(pair.dtype), self._group((down,), pair.dtype)
        wanted = getattr(down, "preferred_element_type", None) or pair.dtype
        if single is None or {single.dtype, residual.dtype, jnp.dtype(wanted)} != {pair.dtype}:
            product = lora_swiglu(x, *pair.members, **self._options(dropout_key=pair.key))
            return residual + down(product)
        options = self._options(dropout_keys=(pair.key, single.key), repeated=repeated)
        y = lora_mlp(x, *pair.members, *single.members, residual=residual, **options)
        return _finish(down, y)

    def _options(self, **more: Any) -> dict[str, Any]:
        common = {"dropout_rate": self.dropout_rate, "kernels": self.kernels_now}
        return {**common, "row_axes": ROW_AXES, **more}

    def _group(self, layers: Sequence[Any], dtype) -> "_Group | None":
        """Returns the operands of one call for all layers, or None if they differ from this one.

        Plain layers take part while they are frozen: the operation gives no gradient of a base
        weight.
        """
        members, dtypes, key = [], set(), None
        for layer in layers:
            if isinstance(layer, LoraLinear) and not layer.merged:
                same = (layer.dropout_rate, layer.kernels_now)
                if same != (self.dropout_rate, self.kernels_now):
                    return None
                a, b = layer.lora_a[...], layer.lora_b[...]
                members.append(LoraWeights(layer.kernel[...], a, b, scale=layer.scale))
                key = layer._key() if layer.dropout_rate and key is None else key
            elif is_adaptable(layer) and isinstance(layer.kernel, Frozen):
                members.append(LoraWeights(layer.kernel.get_value()))
            else:
                return None
            dtypes.add(jnp.dtype(layer.dtype or jnp.promote_types(dtype, members[-1].w.dtype)))
        return _Group(members, dtypes.pop(), key) if len(dtypes) == 1 else None

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


class _Group(NamedTuple):
    """Operands of one call for several layers: their common dtype, and the first one's key."""

    members: list[LoraWeights]
    dtype: Any
    key: Array | None


def _finish(layer: Any, y: Array) -> Array:
    """Adds the bias of an adapted or plain layer and gives the dtype that it promises."""
    if layer.bias is not None:
        y += layer.bias[...].astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
    wanted = layer.preferred_element_type
    return y if wanted is None else y.astype(wanted)
