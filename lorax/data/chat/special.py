"""The texts of special tokens, and those that messages hold in their own words."""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence

from lorax.data.chat.fields import Field, fields_of
from lorax.data.chat.lost import forms
from lorax.data.chat.tokenizer import Tokenizer, named_token_id, special_tokens
from lorax.data.reading.conversation import Message
from lorax.data.reading.rows import RowError, show_messages


@dataclasses.dataclass(frozen=True)
class SpecialTexts:
    """The special tokens of a tokenizer.

    Attributes:
        ids: Id of each, by its text.
        begin: The text of BOS; None if there is none, or if it is EOS too.
    """

    ids: Mapping[str, int]
    begin: str | None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "SpecialTexts":
        """Returns the special tokens of a tokenizer."""
        ids = special_tokens(tokenizer)
        begin = named_token_id(tokenizer, "bos")
        eos = named_token_id(tokenizer, "eos")
        names = {token: text for text, token in ids.items()}
        return cls(ids, None if begin is None or begin == eos else names[begin])

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches special tokens in a text: of several that begin alike, the longest."""
        texts = sorted(self.ids, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts)) or "(?!)")

    def hide(self, text: str) -> str:
        """Returns a text of the same length with its special tokens blanked out."""
        return self.pattern.sub(lambda found: "\1" * len(found[0]), text)

    def hidden(self, fields: Iterable[Field]) -> list[Field]:
        """Returns fields with the special tokens of their texts blanked out likewise."""
        return [field._replace(texts=tuple(map(self.hide, field.texts))) for field in fields]

    def inside(self, message: Message, text: str) -> set[int]:
        """Returns the tokens in a message's words in `text`, except one that ends them."""
        words = _texts_of(message)
        return {
            self.ids[match[0]]
            for number, part in enumerate(words, start=1)
            for match in self.pattern.finditer(part)
            if number < len(words) or match.end() < len(part)
            if _stands_in(text, part)
        }

    def refuse_begin(self, messages: Iterable[Message], text: str) -> None:
        """Refuses BOS in the words of messages, unless the conversation begins with it.

        Args:
            messages: The conversation.
            text: Its rendering. A template may write BOS anywhere in it, and more than once.

        Raises:
            RowError: Naming the messages.
        """
        begin = self.begin
        if begin is None or (text.count(begin) == 1 and text.lstrip().startswith(begin)):
            return
        found = [
            index
            for index, message in enumerate(messages)
            if any(begin in words and _stands_in(text, words) for words in _texts_of(message))
        ]
        if found:
            raise RowError(
                f"the text of {show_messages(found)} holds {begin!r}, the tokenizer's BOS, which "
                "belongs at the beginning of a conversation alone, and there once; remove it from "
                "the text"
            )


def _texts_of(message: Message) -> Sequence[str]:
    return [words for field in fields_of([message]) for words in field.texts]


def _stands_in(text: str, words: str) -> bool:
    return any(form in text for form in forms(words))
