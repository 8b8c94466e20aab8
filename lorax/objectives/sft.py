"""Supervised fine-tuning: the next token's loss."""

import dataclasses
from typing import Any

from jaxtyping import Array, Float, Int

from lorax.config.data import DataConfig
from lorax.config.run import RunConfig
from lorax.data.batches import Batches
from lorax.data.dataset import EncodedDataset
from lorax.data.encode import load_encoded_dataset
from lorax.objectives.linear_loss import linear_cross_entropy
from lorax.objectives.objective import Batch, LossFunction, Terms, checked
from lorax_kernels import IGNORED

READ = frozenset({"input_ids", "labels", "positions", "segment_ids", "inputs_embeds"})
"""The keys of a batch that the loss reads."""


def causal_lm_loss(model: Any, batch: Batch) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Returns (Σ nll, supervised tokens) of a micro-batch under one of `lorax.models`.

    Args:
        model: A `lorax.models.decoder.CausalLM`.
        batch: ``input_ids``, ``labels`` (already shifted: the label at t is token t + 1, or
            `IGNORED`), ``positions`` and, when packed, ``segment_ids``, each rows × sequence; and
            ``inputs_embeds``, rows × sequence × d, where the model's embedding is not to be read.

    Raises:
        ValueError: If ``input_ids`` has another number of axes, or the batch lacks a key or has
            another one.
    """
    if missing := sorted({"input_ids", "labels"} - set(batch)):
        raise ValueError(
            f"the batch lacks {' and '.join(missing)}: this loss is the next token's. For another "
            "model, pass its own as make_train_step(model, optimizer, loss_fn)"
        )
    if unread := sorted(set(batch) - READ):
        raise ValueError(
            f"the batch holds {', '.join(unread)}, which this loss does not read: leave it out. "
            f"Pad on the right, with the label {IGNORED} where nothing is learned"
        )
    if len(shape := batch["input_ids"].shape) != 2:
        raise ValueError(
            f"input_ids of a micro-batch must be rows × sequence, got the shape {shape}; the batch "
            "of a training step has one axis of micro-batches before these: for a single one, "
            "jax.tree.map(lambda x: x[None], batch)"
        )
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


@dataclasses.dataclass(frozen=True)
class Supervised:
    """Supervised fine-tuning on rows with a loss mask, packed or not.

    Attributes:
        name: See `Objective`.
        loss_fn: ``(model, micro_batch) -> (sum of losses, count)``.
    """

    name: str
    loss_fn: LossFunction
    figures: tuple[str, ...] = ()
    reference: bool = False

    def claims(self, config: RunConfig) -> bool:
        """See `Objective`."""
        return True

    def encode(
        self, sources: Any, data: DataConfig, tokenizer: Any, *, vocab_size: int
    ) -> EncodedDataset:
        """See `Objective`."""
        return load_encoded_dataset(sources, data, tokenizer, vocab_size=vocab_size)

    def batches(
        self, rows: EncodedDataset, config: RunConfig, *, size: int, count: int, shuffle: bool
    ) -> Batches:
        """See `Objective`."""
        return Batches(
            rows,
            rows_per_micro_batch=size,
            micro_batches=count,
            packing=config.data.packing,
            max_seq_length=config.data.max_seq_length,
            seed=config.train.seed,
            shuffle=shuffle,
        )

    def terms(self, model: Any, batch: Batch) -> Terms:
        """See `Objective`."""
        return checked(self.loss_fn)(model, batch)


SFT = Supervised("sft", causal_lm_loss)
