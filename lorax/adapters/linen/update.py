"""What an adapted layer finds beside its weights while a Linen model is applied."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Key

from lorax.adapters.method import Params, Spec
from lorax.layers.maps import Map, TokenRows, Way
from lorax_kernels import Kernels, LoraWeights, Matrix

# Parameters travel together, so whatever carries a layer's kernel to it, such as `nn.scan`, carries
# this. What changes kernels on the way, such as `nn.WeightNorm`, knows them by this word.
BESIDE = "kernel_adapter"
"""The name of an `Update` among the parameters of its layer."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Update:
    """The adapter of a layer, or of stacked layers: a pytree.

    All but arrays is static. So a function that JAX has traced with other settings, or without an
    adapter, is traced again: `nn.jit` keeps what it traced.

    Attributes:
        values: The adapter's values by name.
        key: What decides the dropout mask; None without dropout.
        spec: What the adapter is.
        linear_map: The layer's.
        kernels: What computes it.
    """

    values: Params
    key: Key[Array, ""] | None
    spec: Spec = dataclasses.field(metadata={"static": True})
    linear_map: Map = dataclasses.field(metadata={"static": True})
    kernels: Kernels = dataclasses.field(metadata={"static": True})

    @property
    def way(self) -> Way:
        """How the adapter is computed."""
        rate = 0.0 if self.key is None else self.spec.dropout
        return Way(rate, self.key, self.kernels)

    def operands(self, w: Matrix) -> LoraWeights | TokenRows:
        """See `Method.operands`."""
        return self.spec.method.operands(self.spec, w, self.values)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Marker:
    """Stands for an `Update` in a trace that finds out what a model does.

    Attributes:
        probe: An array of a shape and dtype that no layer has, or None.
        trace: What tells this trace and layer from all others, so that no trace that was kept is
            used: `nn.jit` keeps one for all modules of one structure.
    """

    probe: Any
    trace: Any = dataclasses.field(metadata={"static": True})
