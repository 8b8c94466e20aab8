"""Linear maps of layers: how each kind of layer multiplies its input by a matrix (k, n).

A layer's kernel is seen as W, (k, n). For any matrix M of k rows, ``product(x, M)`` is what the
layer computes with M in the place of W. So LoRA on every kind of layer is
``product(x, W) + s · product(dropout(x), A) · B``.
"""

import dataclasses
import math
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from flax import linen
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from lorax.devices.mesh import ROW_AXES
from lorax_kernels import (
    Kernels,
    LoraWeights,
    Matrix,
    accumulation_dtype,
    dense,
    lora_linear,
    scale_columns,
)

type Kind = Literal["matmul", "lookup", "convolution"]


@dataclasses.dataclass(frozen=True)
class Way:
    """How the adapter of a layer is computed in one call.

    Attributes:
        dropout_rate: Probability of dropping an element of the adapter's input.
        dropout_key: What decides the mask; None without dropout.
        kernels: What computes it: see `lorax_kernels.lora_linear`.
    """

    dropout_rate: float = 0.0
    dropout_key: Key[Array, ""] | None = None
    kernels: Kernels = "auto"


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """Rows of an embedding, or columns of a head, that stand in the place of W's own.

    Attributes:
        ids: The tokens, each once.
        values: A column for each token, (features, t).
        own: W's own values of them.
    """

    ids: tuple[int, ...]
    values: Array
    own: Array


class Map(Protocol):
    """A kind of linear map with its sizes. It is static: hashable, and without arrays."""

    @property
    def kind(self) -> Kind:
        """The kind's name."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of W, (k, n)."""
        ...

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """The shape of the layer's kernel."""
        ...

    def matrix(self, kernel: Any) -> Any:
        """Returns W of a kernel; axes before its own are kept."""
        ...

    def kernel(self, matrix: Array) -> Array:
        """Returns the kernel of a W; axes before its own are kept."""
        ...

    def apply(
        self, x: Array, weights: LoraWeights, way: Way, dtype: DTypeLike, residual: Any = None
    ) -> Array:
        """Returns ``factor · (x∘W + s·(x∘A)·B)``, of the shape that the layer gives.

        The bias of `weights`, in the order of W's columns, is added to it.
        """
        ...

    def replace(self, x: Array, w: Matrix, rows: TokenRows, dtype: DTypeLike) -> Array:
        """Returns ``x∘W`` with the values of some tokens in the place of W's own."""
        ...

    def replaced(self, w: Array, rows: TokenRows) -> Array:
        """Returns W, float32, with these values in it."""
        ...


@dataclasses.dataclass(frozen=True)
class Matmul:
    """``x·W`` over some axes of x, as `Linear`, `LinearGeneral` and `Einsum` have it.

    Attributes:
        inputs: Sizes of the axes that are summed over, in W's order.
        outputs: Sizes of the axes that take their place, in W's order.
        axis: The summed axes of x, in W's order; negative ones count from the end.
        order: Axes of the kernel in W's order, inputs and then outputs; None: as they are.
        places: The axes of the layer's output that `outputs` are; None: the last ones.
        sorted_axes: Whether the summed axes are taken in their order in x.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axis: tuple[int, ...] = (-1,)
    order: tuple[int, ...] | None = None
    places: tuple[int, ...] | None = None
    sorted_axes: bool = False

    kind: Kind = dataclasses.field(default="matmul", init=False)

    @property
    def shape(self) -> tuple[int, int]:
        """See `Map`."""
        return math.prod(self.inputs), math.prod(self.outputs)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """See `Map`."""
        sizes = (*self.inputs, *self.outputs)
        if self.order is None:
            return sizes
        return tuple(sizes[self.order.index(axis)] for axis in range(len(sizes)))

    def matrix(self, kernel: Any) -> Any:
        """See `Map`."""
        if len(self.kernel_shape) == 2 and self.order is None:
            return kernel  # which may be stored in another format
        lead = kernel.ndim - len(self.kernel_shape)
        if self.order is not None:
            order = (*range(lead), *(lead + axis for axis in self.order))
            kernel = jnp.transpose(kernel, order)
        return kernel.reshape(*kernel.shape[:lead], *self.shape)

    def kernel(self, matrix: Array) -> Array:
        """See `Map`."""
        if len(self.kernel_shape) == 2 and self.order is None:
            return matrix
        lead = matrix.ndim - 2
        kernel = matrix.reshape(*matrix.shape[:lead], *self.inputs, *self.outputs)
        if self.order is None:
            return kernel
        back = (self.order.index(axis) for axis in range(len(self.order)))
        return jnp.transpose(kernel, (*range(lead), *(lead + axis for axis in back)))

    def rows(self, x: Array) -> Array:
        """Returns x as (…, k): the axes that are summed over become the last one."""
        if self.axis == (-1,):
            return x
        count = len(self.axis)
        axis = [axis % x.ndim for axis in self.axis]
        x = jnp.moveaxis(x, sorted(axis) if self.sorted_axes else axis, range(-count, 0))
        return x.reshape(*x.shape[:-count], self.shape[0])

    def unfold(self, y: Array) -> Array:
        """Returns the layer's output of (…, n)."""
        if len(self.outputs) != 1:
            y = y.reshape(*y.shape[:-1], *self.outputs)
        if self.places is None:
            return y
        return jnp.moveaxis(y, range(-len(self.outputs), 0), self.places)

    def apply(
        self, x: Array, weights: LoraWeights, way: Way, dtype: DTypeLike, residual: Any = None
    ) -> Array:
        """See `Map`; a residual has the shape (…, n), for a layer whose output has it."""
        assert weights.a is not None and weights.b is not None
        y = lora_linear(
            self.rows(x.astype(dtype)),
            weights.w,
            weights.a,
            weights.b,
            scale=weights.scale,
            factor=weights.factor,
            residual=residual,
            dropout_rate=way.dropout_rate,
            dropout_key=way.dropout_key,
            kernels=way.kernels,
            row_axes=ROW_AXES,
        )
        return self.unfold(with_bias(y, weights.bias))

    def replace(self, x: Array, w: Matrix, rows: TokenRows, dtype: DTypeLike) -> Array:
        """See `Map`."""
        x = self.rows(x.astype(dtype))
        # As a change, which is exactly 0 at first: a narrow matmul sums in another order.
        change = (rows.values - rows.own.astype(rows.values.dtype)).astype(dtype)
        y = jnp.dot(x, jax.lax.stop_gradient(dense(w, dtype)))
        return self.unfold(y.at[..., jnp.array(rows.ids)].add(jnp.dot(x, change)))

    def replaced(self, w: Array, rows: TokenRows) -> Array:
        """See `Map`; tokens are columns."""
        return w.astype(jnp.float32).at[:, jnp.array(rows.ids)].set(rows.values)


@dataclasses.dataclass(frozen=True)
class Lookup:
    """``W[x]``, the rows of an embedding. Its update has no dropout, as in PEFT.

    Attributes:
        shape: (vocabulary, features).
    """

    shape: tuple[int, int]

    kind: Kind = dataclasses.field(default="lookup", init=False)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """See `Map`."""
        return self.shape

    def matrix(self, kernel: Any) -> Any:
        """See `Map`."""
        return kernel

    def kernel(self, matrix: Array) -> Array:
        """See `Map`."""
        return matrix

    def product(self, x: Array, m: Array) -> Array:
        """Returns the rows of `m` at the ids x."""
        return jnp.take(m, x, axis=0)

    def apply(
        self, x: Array, weights: LoraWeights, way: Way, dtype: DTypeLike, residual: Any = None
    ) -> Array:
        """See `Map`."""
        assert weights.a is not None
        y = self.product(x, dense(weights.w, dtype))
        return _finish(y, self.product(x, weights.a), weights, residual)

    def replace(self, x: Array, w: Matrix, rows: TokenRows, dtype: DTypeLike) -> Array:
        """See `Map`."""
        order = sorted(range(len(rows.ids)), key=rows.ids.__getitem__)
        ids = jnp.array([rows.ids[index] for index in order])
        place = jnp.clip(jnp.searchsorted(ids, x), max=len(order) - 1)
        own = jnp.take(rows.values.T.astype(dtype), jnp.take(jnp.array(order), place), axis=0)
        found = jnp.take(ids, place) == x
        return jnp.where(found[..., None], own, self.product(x, dense(w, dtype)))

    def replaced(self, w: Array, rows: TokenRows) -> Array:
        """See `Map`; tokens are rows."""
        return w.astype(jnp.float32).at[jnp.array(rows.ids)].set(rows.values.T)


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution; Flax computes it.

    Attributes:
        layer: A Flax Linen convolution of the same settings.
        inputs: Features of its input.
    """

    layer: linen.Conv
    inputs: int

    kind: Kind = dataclasses.field(default="convolution", init=False)

    @property
    def shape(self) -> tuple[int, int]:
        """See `Map`; k counts the places of the kernel and the features of the input."""
        return math.prod(self.kernel_shape[:-1]), self.layer.features

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """See `Map`."""
        return (*self.window, self.inputs, self.layer.features)

    @property
    def window(self) -> tuple[int, ...]:
        """The sizes of the kernel along the axes that it moves on."""
        size = self.layer.kernel_size
        return (size,) if isinstance(size, int) else tuple(size)

    def matrix(self, kernel: Any) -> Any:
        """See `Map`."""
        lead = kernel.ndim - len(self.kernel_shape)
        return kernel.reshape(*kernel.shape[:lead], *self.shape)

    def kernel(self, matrix: Array) -> Array:
        """See `Map`."""
        return matrix.reshape(*matrix.shape[:-2], *self.kernel_shape)

    def product(self, x: Array, m: Array) -> Array:
        """Returns the convolution of x with a kernel of other features, m (k, c)."""
        layer = self.layer.clone(features=m.shape[1], use_bias=False, parent=None, name=None)
        kernel = m.reshape(*self.kernel_shape[:-1], m.shape[1])
        return jnp.asarray(layer.apply({"params": {"kernel": kernel}}, x))

    def apply(
        self, x: Array, weights: LoraWeights, way: Way, dtype: DTypeLike, residual: Any = None
    ) -> Array:
        """See `Map`."""
        assert weights.a is not None
        x = x.astype(dtype)
        y = self.product(x, dense(weights.w, dtype))
        h = self.product(_drop(x, way), weights.a.astype(dtype))
        return _finish(y, h, weights, residual)

    def replace(self, x: Array, w: Matrix, rows: TokenRows, dtype: DTypeLike) -> Array:
        """See `Map`."""
        raise TypeError("a convolution has no tokens")

    def replaced(self, w: Array, rows: TokenRows) -> Array:
        """See `Map`."""
        raise TypeError("a convolution has no tokens")


def with_bias(y: Array, bias: Array | None) -> Array:
    """Returns (…, n) with a bias (n,) added, in its dtype."""
    if bias is None:
        return y
    return y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


def _drop(x: Array, way: Way) -> Array:
    if not way.dropout_rate:
        return x
    assert way.dropout_key is not None
    keep = jax.random.bernoulli(way.dropout_key, 1 - way.dropout_rate, x.shape)
    return jnp.where(keep, x / (1 - way.dropout_rate), 0).astype(x.dtype)


def _finish(y: Array, h: Array, weights: LoraWeights, residual: Any) -> Array:
    """Returns ``factor · (y + s·h·B) + bias + residual`` in `y`'s dtype."""
    assert weights.b is not None
    wide = accumulation_dtype(y.dtype)
    b = (weights.scale * weights.b.astype(wide)).astype(y.dtype)
    y += jnp.dot(h.astype(y.dtype), b)
    if weights.factor is not None:
        y = scale_columns(y, weights.factor)
    y = with_bias(y, weights.bias)
    return y if residual is None else residual + y
