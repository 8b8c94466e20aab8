"""From learned characters to supervised tokens, end-of-turn tokens included."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int64

from lorax.data.chat.tokenizer import (
    TokenizedText,
    Tokenizer,
    named_token_id,
    special_tokens,
    tokenize_texts,
)
from lorax.data.chat.turns import RenderedText
from lorax.data.dataset import EncodedRow
from lorax.data.reading.formats import IGNORED_LABEL, TokenRow
from lorax.data.reading.rows import DataError, MalformedRowError, RowError, show_messages


@dataclasses.dataclass(frozen=True)
class StopTokens:
    """The tokens that can end a turn.

    Attributes:
        begin: The tokenizer's beginning of sequence, if it has one of its own.
        eos: The tokenizer's end of sequence, if it has one.
        special: All special tokens but the one that begins a sequence.
        train_on_eos: Which of them are learned: turn, last, all or none.
        learned: Those that were learned at the end of a learned turn.
    """

    begin: int | None
    eos: int | None
    special: frozenset[int]
    train_on_eos: str
    learned: set[int] = dataclasses.field(default_factory=set, compare=False)

    @classmethod
    def of(cls, tokenizer: Tokenizer, train_on_eos: str) -> "StopTokens":
        """Returns the stop tokens of a tokenizer."""
        begin = named_token_id(tokenizer, "bos")
        eos = named_token_id(tokenizer, "eos")
        begin = None if begin == eos else begin
        unknown = named_token_id(tokenizer, "unk")
        special = frozenset(special_tokens(tokenizer).values()) - ({begin, unknown} - {eos})
        return cls(begin, eos, special, train_on_eos)


def mask_plain(tokenized: TokenizedText, rendered: RenderedText, stops: StopTokens) -> EncodedRow:
    """Supervises the tokens of plain text that touch a learned character, and the stop after them.

    A text that begins with BOS, or ends with a special token (white space aside), gets no second
    one from the tokenizer or this function.

    Args:
        tokenized: The text with the special tokens its tokenizer adds.
        rendered: The same text; EOS is appended unless a special token ends it.
        stops: The stop is supervised unless `train_on_eos` is none.

    Returns:
        Token ids, and which of them are supervised. No token is masked for being the pad token.

    Raises:
        RowError: If a completion holds BOS after the beginning of the row, or EOS before its end.
        DataError: If EOS should be learned and the tokenizer has none.
    """
    tokens = tokenized.ids
    supervised = np.zeros(len(tokens), np.bool_)
    for start, end in rendered.spans:
        supervised |= tokenized.inside(start, end)
    if rendered.mask_source == "completion":
        _refuse_begin(tokenized, supervised, rendered.text, stops)
    stop = _find_stop(tokenized, rendered.text, np.arange(len(tokens)), stops)
    adds_eos = (
        bool(len(tokens)) and tokens[-1] == stops.eos and tokenized.starts[-1] == tokenized.ends[-1]
    )
    if adds_eos and stop is None:
        stop = len(tokens) - 1
    elif adds_eos:
        tokens = tokens[:-1]
        supervised = supervised[:-1]
    if stop is None and stops.eos is not None:
        stop = len(tokens)
        tokens = np.append(tokens, np.int32(stops.eos))
        supervised = np.append(supervised, False)
    if (
        rendered.mask_source == "completion"
        and (tokens[:stop] == stops.eos)[supervised[:stop]].any()
    ):
        raise RowError(
            "the completion holds EOS before it ends, so the model would learn to stop in the "
            "middle; remove it from the text"
        )
    if stop is not None:
        if rendered.mask_source != "all":
            supervised[stop + 1 :] = False
        supervised[stop] = stops.train_on_eos != "none"
        stops.learned.update(tokens[[stop]][supervised[[stop]]].tolist())
    elif stops.train_on_eos != "none":
        raise DataError(
            "the tokenizer has no eos_token, so the model would never learn to stop; set one, "
            "or set data.train_on_eos: none"
        )
    if _begins_twice(tokenized, rendered.text, stops):
        tokens = tokens[1:]
        supervised = supervised[1:]
    return tokens, supervised


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the token ids of plain text that is to be continued.

    A plain row that begins with the text begins with these ids, except for a token that reaches
    beyond its end: with one BOS, if the tokenizer adds it, and nothing that it adds after a text.

    Raises:
        DataError: If the tokenizer fails.
    """
    stops = StopTokens.of(tokenizer, "none")
    (tokenized,) = tokenize_texts(tokenizer, [text], add_special_tokens=True)
    end = len(tokenized.ids)
    widths = tokenized.ends - tokenized.starts
    while end and not widths[end - 1] and int(tokenized.ids[end - 1]) in stops.special:
        end -= 1
    return tokenized.ids[_begins_twice(tokenized, text, stops) : end].tolist()


def mask_labels(row: TokenRow, stops: StopTokens) -> EncodedRow:
    """Supervises the tokens of a tokenized row that its labels name, or all without labels.

    The special tokens at the end of a supervised stretch are learned stop tokens.

    Raises:
        MalformedRowError: If a number cannot be a token id.
    """
    try:
        tokens = np.asarray(row.tokens, np.int32)
    except OverflowError as error:
        raise MalformedRowError(f"input_ids holds a number that is no token id: {error}") from error
    labels = row.tokens if row.labels is None else row.labels
    supervised = np.asarray([label != IGNORED_LABEL for label in labels], np.bool_)
    ends = supervised & ~np.append(supervised[1:], False)
    stops.learned.update(set(tokens[ends].tolist()) & stops.special)
    return tokens, supervised


def mask_turns(tokenized: TokenizedText, rendered: RenderedText, stops: StopTokens) -> EncodedRow:
    """Supervises each learned turn of a conversation up to its stop token.

    The stop token is the special token a turn ends with, white space aside, or the one right
    after the turn. Text after it in the turn, such as ChatML's line break, is not learned.

    Args:
        tokenized: The rendered conversation, tokenized without added special tokens.
        rendered: Its text and learned turns.
        stops: `train_on_eos` selects the stop tokens that are supervised. turn: those of the
            learned turns; last: that of the last of them; none: none of them; all: every token of
            the row with the id of one of them, so those of user turns too.

    Raises:
        RowError: If a turn has no stop token although it should be learned, or two; if an answer's
            own words hold one before they end; or if the row begins with two BOS.
    """
    if _begins_twice(tokenized, rendered.text, stops):
        raise RowError(
            "the rendered conversation begins with BOS twice, and no message brings one along: set "
            "data.chat_template to one that writes it once"
        )
    supervised = np.zeros(len(tokenized.ids), np.bool_)
    found: list[int] = []
    for number, (start, end) in enumerate(rendered.spans, start=1):
        inside = np.flatnonzero(tokenized.inside(start, end))
        words_end = rendered.words_ends[number - 1] if rendered.words_ends else 0
        stop = _find_stop(tokenized, rendered.text, inside, stops, words_end)
        needed = rendered.one_turn_per_span or number == len(rendered.spans)
        if stop is None and needed and stops.train_on_eos != "none":
            raise RowError(
                f"learned turn {number} of {len(rendered.spans)} ends without a special token, so "
                "the model would never learn to stop. "
                "Let the chat template end assistant turns with eos_token or another special "
                "token, or set data.train_on_eos: none"
            )
        supervised[inside] = True
        if stop is not None:
            _refuse_second_stop(tokenized, rendered.text, inside[inside < stop], stop)
            if rendered.mask_source != "all":
                supervised[inside[inside > stop]] = False
            supervised[stop] = True
            found.append(stop)
    ends = {stops.eos, *tokenized.ids[found].tolist()}
    _refuse_stops_inside([i for i, special in rendered.inside.items() if special & ends])
    match stops.train_on_eos:
        case "last":
            supervised[found[:-1]] = False
        case "none":
            supervised[found] = False
        case "all":
            supervised |= np.isin(tokenized.ids, tokenized.ids[found])
    stops.learned.update(int(tokenized.ids[index]) for index in found if supervised[index])
    return tokenized.ids, supervised


def _begins_twice(tokenized: TokenizedText, text: str, stops: StopTokens) -> bool:
    """Says whether BOS is the first token and the next visible one, white space aside."""
    if stops.begin is None or tokenized.ids[:1].tolist() != [stops.begin]:
        return False
    for place in range(1, len(tokenized.ids)):
        if text[tokenized.starts[place] : tokenized.ends[place]].strip():
            return int(tokenized.ids[place]) == stops.begin
    return False


def _refuse_begin(
    tokenized: TokenizedText, learned: Bool[np.ndarray, " tokens"], text: str, stops: StopTokens
) -> None:
    """Refuses BOS in a completion, unless only white space comes before it."""
    places = np.flatnonzero(learned & (tokenized.ids == stops.begin))
    if any(text[: tokenized.starts[place]].strip() for place in places):
        raise RowError(
            "the completion holds the tokenizer's BOS, which belongs at the beginning of a row "
            "alone; remove it from the text"
        )


def _refuse_stops_inside(messages: Sequence[int]) -> None:
    """Refuses messages of the assistant with a stop token before their end."""
    if messages:
        raise RowError(
            f"the text of {show_messages(messages)} (assistant) holds a stop token before it ends, "
            "so the model would learn to stop in the middle; remove the token there"
        )


def _refuse_second_stop(
    tokenized: TokenizedText, text: str, before: Int64[np.ndarray, " turn"], stop: int
) -> None:
    """Refuses a turn whose words end with the stop token that the template writes after them."""
    for index in before[::-1]:
        if text[tokenized.starts[index] : tokenized.ends[index]].strip():
            if tokenized.ids[index] == tokenized.ids[stop]:
                raise RowError(
                    "a learned turn ends with its stop token twice: the chat template writes one, "
                    "and another ends the message's text; remove it there"
                )
            return


def _find_stop(
    tokenized: TokenizedText,
    text: str,
    inside: Int64[np.ndarray, " turn"],
    stops: StopTokens,
    words_end: int = 0,
) -> int | None:
    """Returns the index of the token that ends a turn; EOS wins over other special tokens.

    At the end of a turn's own words, before `words_end`, only EOS counts as its stop.
    """
    if not len(inside):
        return None
    after = int(inside[-1]) + 1
    places = [after] if after < len(tokenized.ids) else []
    for index in inside[::-1]:
        if text[tokenized.starts[index] : tokenized.ends[index]].strip():
            places.insert(0, int(index))
            break
    for wanted in ({stops.eos}, stops.special):
        for index in places:
            if int(tokenized.ids[index]) in wanted and tokenized.starts[index] >= words_end:
                return index
    return next((index for index in places if tokenized.ids[index] == stops.eos), None)
