"""What a model scores on held-out rows: token-weighted loss and exact answers."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lorax.data.batches import BatchPlan
from lorax.data.dataset import EncodedDataset
from lorax.data.prefetch import prefetch
from lorax.devices.determinism import compiler_options
from lorax.devices.placement import batch_placer
from lorax.generate import generate
from lorax.loss import LossFunction, causal_lm_loss


class TextDecoder(Protocol):
    """The part of a tokenizer that turns tokens into text."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> Any:
        """Returns the text of some tokens."""
        ...


class Evaluator:
    """Held-out loss, ``Σ nll / Σ tokens`` over all rows: independent of the batch size.

    Args:
        model: Decides the structure; the weights are passed to each call.
        plan: Batches of the held-out rows, one micro-batch each, in order.
        mesh: Where the batches go.
        loss_fn: ``(model, micro_batch) -> (sum of losses, count)``.
        full_determinism: As for `make_train_step`.
    """

    def __init__(
        self,
        model: nnx.Module,
        plan: BatchPlan,
        mesh: Mesh,
        loss_fn: LossFunction = causal_lm_loss,
        *,
        full_determinism: bool = False,
    ):
        evaluated = nnx.clone(model)
        evaluated.eval()
        graph, _, _ = nnx.split(evaluated, nnx.Param, ...)
        self.plan = plan
        self._place = batch_placer(model, mesh)

        def sums(trainable, frozen, batch):
            merged = nnx.merge(graph, trainable, frozen)
            return loss_fn(merged, jax.tree.map(lambda x: x[0], batch))

        options = compiler_options(True) if full_determinism else None
        self._sums = jax.jit(sums, compiler_options=options)

    def __call__(
        self,
        trainable: nnx.State,
        frozen: nnx.State,
        wait: Callable[[Any], object] = jax.block_until_ready,
    ) -> float:
        """Returns the mean loss in nats per supervised token; `wait` waits for each batch's."""
        sums = []
        for batch in prefetch(self.plan.epoch(0), self._place):
            sums.append(self._sums(trainable, frozen, batch))
            wait(sums[-4:][0])  # a few ahead, so that the device has work
        for last in sums[-3:]:
            wait(last)
        totals, counts = zip(*jax.device_get(sums), strict=True)
        return math.fsum(map(float, totals)) / sum(map(int, counts))


@dataclasses.dataclass(frozen=True)
class Answer:
    """One generated answer beside the one that the row holds.

    Attributes:
        prompt: The tokens before the answer, as text.
        expected: The row's last supervised run, without special tokens.
        generated: What the model wrote, greedily.
    """

    prompt: str
    expected: str
    generated: str

    @property
    def is_exact(self) -> bool:
        """Whether both answers are the same but for white space around them."""
        return self.expected.strip() == self.generated.strip()


def answer_rows(
    model: Any,
    dataset: EncodedDataset,
    tokenizer: TextDecoder,
    *,
    rows: int,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    batch_size: int = 32,
) -> list[Answer]:
    """Lets the model answer the first `rows` rows greedily.

    The answer of a row is its last run of supervised tokens, the prompt all that stands before.
    Rows whose first token is already supervised have no prompt and are skipped.

    Raises:
        ValueError: If no row has a prompt.
    """
    questions = [q for q in map(last_answer, _first_rows(dataset, rows)) if q[0]]
    if not questions:
        raise ValueError("exact match needs rows with a prompt before the supervised answer")
    answers = []
    for start in range(0, len(questions), batch_size):
        chunk = questions[start : start + batch_size]
        # The last batch is filled up, so that every batch has the same compiled shape.
        prompts = [prompt for prompt, _ in chunk]
        filled = prompts + [prompts[0]] * (min(batch_size, len(questions)) - len(prompts))
        written = generate(
            model, filled, max_new_tokens=max_new_tokens, stop_ids=stop_ids, temperature=0.0
        )
        text = lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True))
        answers += [
            Answer(text(prompt), text(expected), text(new))
            for (prompt, expected), new in zip(chunk, written, strict=False)
        ]
    return answers


def exact_match(answers: Sequence[Answer]) -> float:
    """Returns the share of exact answers."""
    return sum(a.is_exact for a in answers) / len(answers)


def last_answer(row: tuple[np.ndarray, np.ndarray]) -> tuple[list[int], list[int]]:
    """Splits a row into the tokens before its last supervised run, and that run."""
    tokens, supervised = row
    end = int(np.flatnonzero(supervised)[-1]) + 1
    gaps = np.flatnonzero(~supervised[:end])
    start = int(gaps[-1]) + 1 if len(gaps) else 0
    return tokens[:start].tolist(), tokens[start:end].tolist()


def _first_rows(dataset: EncodedDataset, rows: int):
    return (dataset.row(i) for i in range(min(rows, len(dataset))))
