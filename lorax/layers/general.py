"""`LinearGeneral` and `Einsum`, matmuls over several axes, with the adapters attached to them."""

from typing import Any, override

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jaxtyping import Array

from lorax.layers.carrier import Carrier, apply_adapted
from lorax.layers.maps import Matmul


class LinearGeneral(Carrier, nnx.LinearGeneral):
    """A matmul over some axes of its input; called like `nnx.LinearGeneral`."""

    flax_class = nnx.LinearGeneral

    @property
    def linear_map(self) -> Matmul:
        """See `Carrier`."""
        return general_map(self.in_features, self.out_features, self.axis)

    @override
    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        if self.computing is None:
            return nnx.LinearGeneral.__call__(self, inputs, out_sharding)
        y = apply_adapted(self, inputs)
        if self.bias is not None:
            rows = (1,) * (y.ndim - self.bias.ndim)
            y += self.bias[...].astype(y.dtype).reshape(*rows, *self.bias.shape)
        return _as_promised(self, y)


class Einsum(Carrier, nnx.Einsum):
    """A matmul written as an einsum; called like `nnx.Einsum`."""

    flax_class = nnx.Einsum

    @property
    def linear_map(self) -> Matmul:
        """See `Carrier`."""
        found = einsum_map(self.einsum_str, tuple(self.kernel_shape))
        assert isinstance(found, Matmul)
        return found

    @override
    def __call__(
        self, inputs: Array, einsum_str: str | None = None, out_sharding: Any = None
    ) -> Array:
        if self.computing is None:
            return nnx.Einsum.__call__(self, inputs, einsum_str, out_sharding)
        y = apply_adapted(self, inputs)
        if self.bias is not None:
            kernel = getattr(self, self.weight_name).get_value()
            shape = self._infer_broadcasted_bias_shape(self.einsum_str, inputs, kernel)
            y += self.bias[...].astype(y.dtype).reshape(shape)
        return _as_promised(self, y)


def _as_promised(layer: Any, y: Array) -> Array:
    wanted = layer.preferred_element_type
    return y if wanted is None else y.astype(wanted)


def general_map(inputs: tuple[int, ...], outputs: tuple[int, ...], axis: tuple[int, ...]) -> Matmul:
    """Returns the map of a `LinearGeneral`, whose kernel is (*inputs, *outputs).

    Flax sums over the axes of x in their order in x, whatever their order in `axis`.
    """
    return Matmul(inputs, outputs, axis=axis, sorted_axes=True)


def general_obstacle(layer: nnx.LinearGeneral) -> str | None:
    """Returns why a `LinearGeneral` cannot carry an adapter, or None."""
    if layer.batch_axis:
        return "it has a batch_axis: a matrix of its own for each index"
    if layer.dot_general not in (None, jax.lax.dot_general) or layer.dot_general_cls is not None:
        return "it has a dot_general of its own"
    return _common_obstacle(layer)


def einsum_obstacle(layer: nnx.Einsum) -> str | None:
    """Returns why an `Einsum` cannot carry an adapter, or None."""
    if layer.einsum_op is not jnp.einsum:
        return "it has an einsum_op of its own"
    if isinstance(found := einsum_map(layer.einsum_str, tuple(layer.kernel_shape)), str):
        return found
    return _common_obstacle(layer)


def _common_obstacle(layer: Any) -> str | None:
    if layer.promote_dtype is not promote_dtype:
        return "it has a promote_dtype of its own"
    if layer.precision is not None:
        return f"it sets precision={layer.precision}; set jax_default_matmul_precision instead"
    return None


def einsum_map(einsum: str, shape: tuple[int, ...]) -> Matmul | str:
    """Returns the map of an einsum of (input, kernel), or why it is no matmul.

    Args:
        einsum: For example ``BTD,NDH->BTNH``.
        shape: Of the kernel.
    """
    operands, result = einsum.replace(" ", "").split("->")
    x, w = operands.split(",")
    letters = [term.replace("...", "") for term in (x, w, result)]
    rows = [letter for letter in x.replace("...", "") if letter not in w]
    # In the order in which `jnp.einsum` sums, so that a new adapter changes no bit.
    summed = sorted(letter for letter in w if letter in x and letter not in result)
    free = [letter for letter in w if letter in result and letter not in x]
    repeated = any(len(set(term)) < len(term) for term in letters)
    if repeated or "..." in w or any(letter in x and letter in result for letter in w):
        return f"its einsum {einsum} multiplies elementwise over an axis of both input and output"
    if not summed or not free or len(summed) + len(free) != len(w):
        return f"its einsum {einsum} is no matrix product of input and kernel"
    if [letter for letter in result.replace("...", "") if letter in rows] != rows:
        return f"its einsum {einsum} changes or drops axes of its input"
    sizes = dict(zip(w, shape, strict=True))
    places = tuple(_from_end(letter, result) for letter in free)
    return Matmul(
        inputs=tuple(sizes[letter] for letter in summed),
        outputs=tuple(sizes[letter] for letter in free),
        axis=tuple(_from_end(letter, x) for letter in summed),
        order=tuple(w.index(letter) for letter in (*summed, *free)),
        places=None if places == tuple(range(-len(free), 0)) else places,
    )


def _from_end(letter: str, term: str) -> int:
    """Returns the axis of a letter: from the end, or from the start if ``...`` stands between."""
    place = term.index(letter)
    if "..." in term and place < term.index("..."):
        return place
    return place - len(term)
