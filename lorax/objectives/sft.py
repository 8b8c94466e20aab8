"""Supervised fine-tuning: the next token's loss."""

from typing import Any

from jaxtyping import Array, Float, Int

from lorax.objectives.linear_loss import linear_cross_entropy
from lorax.objectives.objective import Batch
from lorax_kernels import IGNORED


def causal_lm_loss(model: Any, batch: Batch) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Returns (Σ nll, supervised tokens) of a micro-batch under one of `lorax.models`.

    Args:
        model: A `lorax.models.decoder.CausalLM`.
        batch: ``input_ids``, ``labels`` (already shifted: the label at t is token t + 1, or
            `IGNORED`), ``positions`` and, when packed, ``segment_ids``, each rows × sequence; and
            ``inputs_embeds``, rows × sequence × d, where the model's embedding is not to be read.
    """
    labels = batch["labels"]
    hidden = model.hidden_states(
        batch["input_ids"],
        batch.get("positions"),
        batch.get("segment_ids"),
        inputs_embeds=batch.get("inputs_embeds"),
    )
    loss = linear_cross_entropy(
        model.lm_head, hidden, labels, kernels=getattr(model, "kernels", "auto")
    )
    return loss, (labels != IGNORED).sum()
