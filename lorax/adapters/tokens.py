"""Single tokens that train: their rows of an embedding, their columns of a head."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax.adapters.method import Parameter, Params, Shape, Spec, Start
from lorax.layers.maps import TokenRows
from lorax_kernels import Matrix, dense

_KEY = "token_adapter.trainable_tokens_delta"


class Tokens:
    """The values of some tokens in a table, which start as the table's; PEFT's trainable tokens.

    Args:
        name: The method's name.
        axes: Of the values: ``nt`` for an embedding (vocabulary, n), ``kt`` for a head
            (k, vocabulary).
    """

    settings: Mapping[str, Any] = {}
    has_factor = False

    def __init__(self, name: str, axes: str):
        self.name = name
        self.parameters: Mapping[str, Parameter] = {"rows": Parameter(_KEY, axes)}

    def claims(self, config: Any) -> bool:
        """Never: it takes part beside the method of the target modules."""
        return False

    def obstacle(self, spec: Spec, kind: str, shape: Shape) -> str | None:
        """See `Method`."""
        if kind == "convolution":
            return "a convolution has no tokens"
        last = (shape.inputs if kind == "lookup" else shape.outputs) - 1
        if wrong := [token for token in spec.tokens if not 0 <= token <= last]:
            return (
                f"lora.trainable_token_indices needs tokens of 0 to {last}, got {wrong[0]} "
                "(lorax.resize_vocabulary gives a language model rows for more)"
            )
        return None

    def identity(self, spec: Spec) -> str:
        """See `Method`."""
        return f"{self.name} {spec.tokens}"

    def start(self, spec: Spec, w: Matrix, key, kind: str) -> Start:
        """See `Method`."""
        whole = dense(w)
        ids = jnp.array(spec.tokens)
        own = whole[ids].T if kind == "lookup" else whole[:, ids]
        return Start({"rows": own.astype(jnp.float32)}, {"own": own})

    def operands(self, spec: Spec, w: Matrix, values: Params) -> TokenRows:
        """See `Method`."""
        return TokenRows(spec.tokens, values["rows"], values["own"])

    def rank(self, spec: Spec, kind: str) -> int:
        """See `Method`."""
        return 0

    def plain(self, spec: Spec, values: Params) -> tuple[Spec, Params]:
        """See `Method`."""
        return spec, values

    def portable(self, spec: Spec, values: Params, rank: int) -> dict[str, np.ndarray]:
        """See `Method`."""
        raise ValueError(
            "trainable_token_indices changes rows of a table, which no plain LoRA does"
        )


EMBEDDING_TOKENS = Tokens("embedding_tokens", "nt")
HEAD_TOKENS = Tokens("head_tokens", "kt")


def token_spec(kind: str, tokens: tuple[int, ...]) -> Spec:
    """Returns the adapter of a table: of an embedding (``lookup``), or of a head."""
    method = EMBEDDING_TOKENS if kind == "lookup" else HEAD_TOKENS
    return Spec(method, r=0, lora_alpha=0.0, scale=0.0, tokens=tokens)
