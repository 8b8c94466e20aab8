"""How large a model is, for its FLOPs."""

from typing import Any

from flax import nnx

from lorax.adapters.nnx.tree import named_modules
from lorax.metrics import ModelSize


def model_size(model: Any) -> ModelSize:
    """Counts the weight matrices of a `lorax.models.decoder.CausalLM`, for its FLOPs per token."""
    trained = frozen = 0
    for module in named_modules(model).values():
        for name, value in vars(module).items():
            if not isinstance(value, nnx.Variable) or value.get_value() is None or value.ndim < 2:
                continue
            if name == "embedding" and not model.config.tie_word_embeddings:
                continue  # only looked up
            if isinstance(value, nnx.Param):
                trained += value.size
            else:
                frozen += value.size
    config = model.config
    return ModelSize(
        frozen_parameters=frozen,
        trained_parameters=trained,
        layers=config.num_hidden_layers,
        attention_width=config.num_attention_heads * config.head_dim,
    )
