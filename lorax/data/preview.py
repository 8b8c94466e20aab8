"""One example as text, with its loss mask."""

import itertools

import numpy as np

from lorax.data.chat.tokenizer import Tokenizer
from lorax.data.dataset import EncodedDataset


def render_example(
    encoded: EncodedDataset, index: int, tokenizer: Tokenizer
) -> list[tuple[str, bool]]:
    """Returns the text of a row in pieces, each with whether its tokens are supervised.

    Neighbouring tokens of one kind are decoded together, so a character that is spread over
    several tokens stays whole; the pieces joined are the decoded row.

    Args:
        encoded: The dataset.
        index: Row, counted from 0.
        tokenizer: The one that encoded it.
    """
    tokens, supervised = encoded.row(index)
    pieces: list[tuple[str, bool]] = []
    before = ""
    for flag, run in itertools.groupby(range(len(tokens)), key=lambda i: bool(supervised[i])):
        run = list(run)
        upto = _decode(tokenizer, tokens[: run[-1] + 1])
        # Some decoders treat the start of a text differently, so decode the row so far.
        whole = upto.startswith(before)
        pieces.append((upto[len(before) :] if whole else _decode(tokenizer, tokens[run]), flag))
        before = upto
    return pieces


def _decode(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    text = tokenizer.decode(
        tokens.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text
