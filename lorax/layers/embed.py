"""The embedding, with the adapters attached to it."""

import dataclasses
from typing import Any, override

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax.typing import DTypeLike
from jaxtyping import Array

from lorax.layers.carrier import Carrier, apply_adapted
from lorax.layers.maps import Lookup, Matmul, TokenRows, Way
from lorax_kernels import LoraWeights, Matrix, scale_columns


class Embed(Carrier, nnx.Embed):
    """Rows of a table; called like `nnx.Embed`.

    The adapter changes the table, so it takes part in `attend` too.
    """

    flax_class = nnx.Embed
    weight_name = "embedding"
    bias = None

    @property
    def linear_map(self) -> Lookup:
        """See `Carrier`."""
        return Lookup((self.num_embeddings, self.features))

    @override
    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        if self.computing is None:
            return nnx.Embed.__call__(self, inputs, out_sharding)
        if not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise ValueError(f"inputs must be integers, got {inputs.dtype}")
        return apply_adapted(self, inputs)

    @override
    def attend(self, query: Array, out_sharding: Any = None) -> Array:
        """Returns ``query · Wᵀ`` of the adapted table W: the logits of a tied head."""
        if self.computing is None:
            return nnx.Embed.attend(self, query, out_sharding)
        table = self.matrix
        operands = self.computing.operands(table)
        return attended(query, table, operands, self.way, jnp.dtype(self.dtype))


def attended(
    query: Array, table: Matrix, operands: LoraWeights | TokenRows, way: Way, dtype: DTypeLike
) -> Array:
    """Returns ``query · Wᵀ`` of the adapted table, without dropout."""
    query = query.astype(dtype)
    vocabulary, features = table.shape
    matmul = Matmul((features,), (vocabulary,))
    if isinstance(operands, TokenRows):
        return matmul.replace(query, table.T, operands, dtype)  # type: ignore[union-attr]
    if operands.factor is not None:  # of the table's columns, which the query is summed over
        query = scale_columns(query, operands.factor)
    way = dataclasses.replace(way, dropout_rate=0.0, dropout_key=None)
    return matmul.apply(query, transposed(operands), way, dtype)


def transposed(operands: LoraWeights) -> LoraWeights:
    """Returns the operands of ``x · (W + s·A·B)ᵀ``."""
    assert operands.a is not None and operands.b is not None
    return LoraWeights(operands.w.T, operands.b.T, operands.a.T, scale=operands.scale)  # type: ignore[union-attr]


def embed_obstacle(layer: nnx.Embed) -> str | None:
    """Returns why an `Embed` cannot carry an adapter, or None."""
    if layer.promote_dtype is not promote_dtype:
        return "it has a promote_dtype of its own"
    if layer.num_embeddings == 1:
        return "it has one row, which Flax gives whatever the index"
    return None
