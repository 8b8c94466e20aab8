"""Learned turns found by the texts that open a user's and an assistant's turn."""

import json
import re
import shlex

from lorax.config.data import DataConfig
from lorax.data.chat.renderer import Span
from lorax.data.chat.tokenizer import Tokenizer
from lorax.data.reading.conversation import Conversation
from lorax.data.reading.rows import RowError


def spans_between_markers(
    conversation: Conversation, text: str, config: DataConfig, tokenizer: Tokenizer
) -> tuple[Span, ...]:
    """Returns the characters of each learned turn: from its marker to the next marker of any kind.

    Args:
        conversation: The conversation.
        text: Its rendering.
        config: With both markers, `instruction_part` and `response_part`.
        tokenizer: Gives the special tokens, which an error names.

    Raises:
        RowError: If the markers cannot bound every assistant turn.
    """
    instruction = config.instruction_part
    response = config.response_part
    assert instruction is not None and response is not None
    starts = [match.end() for match in re.finditer(re.escape(response), text)]
    size = len(text)
    if len(starts) > len(conversation.replies) and not text[starts[-1] :].strip():
        size = starts.pop() - len(response)  # there the template opens the next turn unasked
    ends = [match.start() for match in re.finditer(re.escape(instruction), text)]
    for name, part, places in (
        ("response_part", response, starts),
        ("instruction_part", instruction, ends),
    ):
        if not places:
            raise RowError(
                f"data.{name} {part!r} is not in the rendered row, whose special "
                f"tokens are {' '.join(_special_tokens_of(text, tokenizer)) or 'none at all'}"
                f"{_advise_escapes(name, part, text)}"
            )
    _check_counts(conversation, starts, ends)
    borders = sorted([start - len(response) for start in starts] + ends + [size])
    spans = [(start, next(end for end in borders if end >= start)) for start in starts]
    learned = conversation.learned_replies(config.loss_on)
    return tuple(span for i, span in zip(conversation.replies, spans, strict=True) if i in learned)


def _advise_escapes(name: str, part: str, text: str) -> str:
    """Returns how to write a line break where a backslash and an n are in its place."""
    meant = part.replace("\\n", "\n").replace("\\r", "\r").replace("\\t", "\t")
    if meant == part or meant not in text:
        return ""
    quoted = json.dumps(meant, ensure_ascii=False)
    return (
        "; the backslash in it is one: YAML makes a line break or a tab of it in double quotes "
        f"alone, data.{name}: {quoted} in a file, {shlex.quote(f'data.{name}={quoted}')} on a "
        "command line"
    )


def _special_tokens_of(text: str, tokenizer: Tokenizer) -> list[str]:
    """Returns the special tokens in a text, in order, and no other part of it."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    names = sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)
    found = re.findall("|".join(map(re.escape, names)), text) if names else []
    return list(dict.fromkeys(found))


def _check_counts(conversation: Conversation, starts: list[int], ends: list[int]) -> None:
    replies = conversation.replies
    later = [message["role"] for message in conversation.messages[replies[0] :]]
    for role in later:
        if role not in ("user", "assistant"):
            raise RowError(
                f"there is a {role} turn after an assistant turn, and data.instruction_part marks "
                "user turns only; use a data.chat_template with {% generation %}"
            )
    found = sum(end >= starts[0] for end in ends)
    if len(starts) != len(replies) or found != later.count("user"):
        raise RowError(
            f"data.response_part occurs {len(starts)} times in the rendered row and "
            f"data.instruction_part {found} times after it, but there are {len(replies)} assistant "
            f"turns and {later.count('user')} user turns after the first of them"
        )
