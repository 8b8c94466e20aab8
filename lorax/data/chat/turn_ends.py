"""Finds the end of a turn in a rendering: of its words, and of its stop token."""

import dataclasses
import re
from collections.abc import Sequence

from lorax.data.chat.fields import Field
from lorax.data.chat.lost import end_of_fields
from lorax.data.chat.renderer import Part, Rendered
from lorax.data.reading.conversation import Conversation

PROMPT = "add_generation_prompt"
"""The variable that asks a template to open the next turn."""

_THOUGHT = re.compile(r"\s*(<think(ing)?>\s*)?")


@dataclasses.dataclass(frozen=True)
class TurnEnds:
    """The turns of a rendered conversation, from their words on.

    Attributes:
        template: The Jinja source.
        talk: The conversation.
        found: Its rendering.
        words: The rendering, of the same length, with its special tokens blanked out.
        fields: The fields that must be in the rendering, with special tokens blanked out likewise.
        special: Matches special tokens.
        learns_all: Whether all of the text is learned, so that no turn need be opened.
    """

    template: str
    talk: Conversation
    found: Rendered
    words: str
    fields: Sequence[Field]
    special: re.Pattern[str]
    learns_all: bool

    def fields_of(self, index: int) -> list[Field]:
        """Returns the texts of message `index`."""
        return [field for field in self.fields if field.message == index]

    def of_words(self, index: int, start: int) -> int | None:
        """Returns where the words of a turn that starts at `start` end.

        None if the template writes them in another order than messages have.
        """
        return end_of_fields(self.fields_of(index), self.words, start)

    def of_turn(self, index: int, start: int) -> int | None:
        """Returns where a turn ends; None if the template rewrites it."""
        end = self.unasked(index, start) or self._closed(index, start)
        return end or self.found.prefixes[Part(index + 1)]

    def of_conversation(self, index: int, start: int | None) -> int:
        """Returns the length of the text without the closing text after its last turn.

        Args:
            index: The last learned turn.
            start: Where it starts.
        """
        is_last = index == len(self.talk.messages) - 1
        closed = self._closed(index, start or 0) if is_last else None
        return closed or len(self.found.text)

    def up_to_stop(self, index: int, start: int, end: int) -> int:
        """Returns where the first special token after a turn's words ends, or the turn itself."""
        behind = self.of_words(index, start)
        if behind is None or behind > end:
            return end
        stop = self.special.search(self.found.text, behind, end)
        return end if stop is None else stop.end()

    def is_opened(self, index: int, start: int) -> bool:
        """Says whether a template without a prompt still opens a turn before its words."""
        words = next((words for field in self.fields_of(index) for words in field.texts), "")
        opening = self.words[start:].partition(words)[0] if words else ""
        return PROMPT in self.template or _THOUGHT.fullmatch(opening) is not None

    def unasked(self, index: int, start: int) -> int | None:
        """Returns where a turn ends if the template always opens the next one after it.

        The text that it adds is not part of the turn; the stop token follows the words.
        """
        fields = self.fields_of(index)
        if PROMPT in self.template or not fields:
            return None
        if any(field.name.endswith(".tool_calls") for field in fields):
            return None
        if not self.learns_all and not self.is_opened(index, start):
            return None
        end = self.of_words(index, start)
        return None if end is None else len(self.words) - len(self.words[end:].lstrip())

    def _closed(self, index: int, start: int) -> int | None:
        """Returns where a turn ends if the template closes the conversation after it.

        The template does so where no turn follows and no prompt is requested. With a turn or a
        prompt it writes the turn, up to its stop token, and then something else.
        """
        is_last = index == len(self.talk.messages) - 1
        alike = self.found.shared.get(Part(index + 1, is_prompt=is_last))
        if alike is None or alike == self.found.prefixes[Part(index + 1)]:
            return None
        words_end = self.of_words(index, start)
        if words_end is None or words_end > alike:
            return None
        behind = self.special.finditer(self.found.text, words_end, alike)
        return max((match.end() for match in behind), default=None)
