"""Where the words of a turn end in a rendering, and where its stop token does."""

import dataclasses
import re
from collections.abc import Sequence

from lorax.data.chat.fields import Field
from lorax.data.chat.lost import end_of_fields
from lorax.data.chat.renderer import Part, Rendered
from lorax.data.reading.conversation import Conversation

PROMPT = "add_generation_prompt"
"""What a template reads that opens the next turn where it is asked to, and not otherwise."""

_THOUGHT = re.compile(r"\s*(<think(ing)?>\s*)?")


@dataclasses.dataclass(frozen=True)
class TurnEnds:
    """The turns of a rendered conversation, from their words on.

    Attributes:
        template: In Jinja.
        talk: The conversation.
        found: What was rendered of it.
        words: The rendering, as long as it is, with its special tokens hidden.
        fields: What the rendering must hold; the texts are hidden likewise.
        special: Finds special tokens.
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
        """Returns how long the text is without what ends the conversation behind its last turn.

        Args:
            index: The last learned turn.
            start: Where it starts.
        """
        is_last = index == len(self.talk.messages) - 1
        closed = self._closed(index, start or 0) if is_last else None
        return closed or len(self.found.text)

    def up_to_stop(self, index: int, start: int, end: int) -> int:
        """Returns where the first special token behind a turn's words ends, or the turn itself."""
        behind = self.of_words(index, start)
        if behind is None or behind > end:
            return end
        stop = self.special.search(self.found.text, behind, end)
        return end if stop is None else stop.end()

    def is_opened(self, index: int, start: int) -> bool:
        """Says whether a template that knows no prompt still opens a turn before its words."""
        words = next((words for field in self.fields_of(index) for words in field.texts), "")
        opening = self.words[start:].partition(words)[0] if words else ""
        return PROMPT in self.template or _THOUGHT.fullmatch(opening) is not None

    def unasked(self, index: int, start: int) -> int | None:
        """Returns where a turn ends behind which the template opens the next one unasked.

        What such a template adds is no part of the turn; its stop token follows the words.
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
        """Returns where a turn ends behind which the template ends the conversation.

        It does so where no turn follows and no prompt is asked for: so with one of them it writes
        the turn, up to its stop token, and then something else.
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
