"""Single tokens that train: their rows of an embedding, their columns of a head."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax.adapters.method import Parameter, Params, Spec, Start
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

    def __init__(self, name: str, axes: str):
        self.name = name
        self.parameters: Mapping[str, Parameter] = {"rows": Parameter(_KEY, axes)}

    def claims(self, config: Any) -> bool:
        """Never: it takes part beside the method of the target modules."""
        return False

    def obstacle(self, kind: str, has_bias: bool) -> str | None:
        """See `Method`."""
        return "a convolution has no tokens" if kind == "convolution" else None

    def identity(self, spec: Spec) -> str:
        """See `Method`."""
        return f"{self.name} {spec.tokens}"

    def start(self, spec: Spec, w: Matrix, key, kind: str) -> Start:
        """See `Method`."""
        whole = dense(w)
        ids = jnp.array(spec.tokens)
        own = whole[ids].T if kind == "lookup" else whole[:, ids]
        return Start({"rows": own.astype(jnp.float32)}, {"own": own}, w)

    def operands(self, spec: Spec, w: Matrix, values: Params) -> TokenRows:
        """See `Method`."""
        return TokenRows(spec.tokens, values["rows"])

    def portable_rank(self, spec: Spec) -> int:
        """See `Method`."""
        return 0

    def portable(self, spec: Spec, values: Params, rank: int) -> dict[str, np.ndarray]:
        """See `Method`."""
        raise ValueError(
            "trainable_token_indices changes rows of a table, which no plain LoRA does"
        )


EMBEDDING_TOKENS = Tokens("embedding_tokens", "nt")
HEAD_TOKENS = Tokens("head_tokens", "kt")


def tokens_of(config: Any, embeddings: list[str]) -> dict[str, tuple[int, ...]]:
    """Returns the tokens that train by the name of their table, as the settings give it.

    Args:
        config: A `LoraConfig`; a list of tokens is of the one embedding.
        embeddings: Names of the model's embeddings.
    """
    given = config.trainable_token_indices
    if not given:
        return {}
    if isinstance(given, Mapping):
        return {name: tuple(sorted(ids)) for name, ids in given.items()}
    first = next((n for n in embeddings if n.split(".")[-1] == "embed_tokens"), None)
    return {first or embeddings[0]: tuple(sorted(given))}
