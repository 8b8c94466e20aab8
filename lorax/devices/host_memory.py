"""The input embedding in the host's memory."""

from typing import Any

import numpy as np
from flax import nnx


class HostArray(np.ndarray):
    """A parameter that stays in the host's memory: ``array.view(HostArray)``.

    A compiled function that reads it copies it in each call; one that does not copies nothing.
    """


def embedding_on_host(model: Any) -> HostArray | None:
    """Returns the input embedding of a model, if it stays in the host's memory."""
    variable = embedding_variable(model)
    value = None if variable is None else variable.get_value()
    return value if isinstance(value, HostArray) else None


def embedding_variable(model: Any) -> nnx.Variable | None:
    """Returns the variable of the input embedding of a `CausalLM`; None of another model."""
    return getattr(_embedding(model), "embedding", None)


def trains_embedding(model: Any) -> bool:
    """Says whether the input embedding of a `CausalLM` changes in training, or carries adapters."""
    adapted = bool(getattr(_embedding(model), "attached", None))
    return adapted or isinstance(embedding_variable(model), nnx.Param)


def _embedding(model: Any) -> Any:
    return getattr(getattr(model, "model", None), "embed_tokens", None)


def embedding_obstacle(model: Any) -> str | None:
    """Returns why the input embedding of a `CausalLM` must be on the device, or None."""
    if model.config.tie_word_embeddings:
        return "the model's output head is the same array (tie_word_embeddings)"
    if getattr(_embedding(model), "attached", None):
        return "the embedding carries an adapter; take it out of lora.target_modules to keep this"
    if trains_embedding(model):
        return "lora.modules_to_save trains the embedding; take it out there to keep this"
    return None
