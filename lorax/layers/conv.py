"""The convolution, with the adapters attached to it."""

from typing import Any, override

import jax
from flax import linen, nnx
from flax.nnx.nn.dtypes import promote_dtype
from jaxtyping import Array

from lorax.layers.carrier import Carrier, apply_adapted
from lorax.layers.maps import Convolution, with_bias


class Conv(Carrier, nnx.Conv):
    """A convolution; called like `nnx.Conv`."""

    flax_class = nnx.Conv

    @property
    def linear_map(self) -> Convolution:
        """See `Carrier`."""
        return convolution_map(self, self.out_features, self.in_features)

    @override
    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        if self.computing is None:
            return nnx.Conv.__call__(self, inputs, out_sharding)
        y = apply_adapted(self, inputs)
        y = with_bias(y, None if self.bias is None else self.bias[...])
        wanted = self.preferred_element_type
        return y if wanted is None else y.astype(wanted)


def convolution_map(layer: Any, features: int, inputs: int) -> Convolution:
    """Returns the map of a convolution of NNX or of Linen, which name their settings alike."""
    alike = linen.Conv(
        features,
        layer.kernel_size,
        strides=layer.strides,
        padding=layer.padding,
        input_dilation=layer.input_dilation,
        kernel_dilation=layer.kernel_dilation,
        use_bias=False,
        dtype=layer.dtype,
        param_dtype=layer.param_dtype,
        precision=layer.precision,
        parent=None,
    )
    return Convolution(alike, inputs)


def conv_obstacle(layer: Any) -> str | None:
    """Returns why a convolution cannot carry an adapter, or None."""
    if layer.feature_group_count != 1:
        return f"it has feature_group_count={layer.feature_group_count}: a matrix for each group"
    if layer.mask is not None:
        return "it has a mask on its kernel"
    if layer.conv_general_dilated is not jax.lax.conv_general_dilated:
        return "it has a conv_general_dilated of its own"
    if layer.promote_dtype is not promote_dtype:
        return "it has a promote_dtype of its own"
    return None
