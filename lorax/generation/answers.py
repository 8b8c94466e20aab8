"""Answers to held-out rows, and the share of exact ones."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from lorax.data.dataset import EncodedDataset
from lorax.generation.generate import generate


class TextDecoder(Protocol):
    """The part of a tokenizer that decodes tokens."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> Any:
        """Returns the text of some tokens."""
        ...


@dataclasses.dataclass(frozen=True)
class Answer:
    """A generated answer, and the answer of the row.

    Attributes:
        prompt: The tokens before the answer, as text.
        expected: The row's last supervised run, without special tokens.
        generated: The model's answer, greedily decoded.
    """

    prompt: str
    expected: str
    generated: str

    @property
    def is_exact(self) -> bool:
        """Whether both answers are equal, white space around them aside."""
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
    """Generates answers to the first `rows` rows greedily.

    The answer of a row is its last run of supervised tokens, the prompt all tokens before it.
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

        def text(tokens):
            return str(tokenizer.decode(tokens, skip_special_tokens=True))

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
