"""The feed-forward layer."""

from flax import nnx
from jaxtyping import Array, Float

from lorax.layers.linear import Execution, make_linear
from lorax.layers.together import apply_mlp


class MLP(nnx.Module):
    """SwiGLU: ``down(silu(gate(x)) · up(x))``.

    Source: Shazeer 2020, eq. 6, https://arxiv.org/abs/2002.05202
    """

    def __init__(self, width: int, inner: int, bias: bool, execution: Execution, rngs: nnx.Rngs):
        self.gate_proj = make_linear(width, inner, bias, execution, rngs)
        self.up_proj = make_linear(width, inner, bias, execution, rngs)
        self.down_proj = make_linear(inner, width, bias, execution, rngs)

    def __call__(
        self, x: Float[Array, "b t d"], residual: Float[Array, "b t d"], repeated: bool
    ) -> Float[Array, "b t d"]:
        """Returns `residual` plus the output; `repeated`: the backward pass recomputes it."""
        return apply_mlp(self.gate_proj, self.up_proj, self.down_proj, x, residual, repeated)
