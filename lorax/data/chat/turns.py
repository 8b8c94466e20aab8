"""The learned turns in a rendered conversation: by markers, generation blocks, or prefixes."""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence, Set

from lorax.config.data import DataConfig
from lorax.data.chat.fields import (
    NEEDED,
    Field,
    fields_of,
    fields_of_tools,
    unread_keys,
    unread_tool_keys,
)
from lorax.data.chat.lost import LostError, end_of_fields, forms, lost_fields
from lorax.data.chat.markers import spans_between_markers
from lorax.data.chat.renderer import Part, Rendered, Span
from lorax.data.chat.special import SpecialTexts
from lorax.data.chat.template_names import GENERATION, read_variables
from lorax.data.chat.tokenizer import Tokenizer
from lorax.data.chat.turn_ends import TurnEnds
from lorax.data.dataset import tell_ignored
from lorax.data.reading.conversation import Conversation
from lorax.data.reading.rows import RowError, check_unicode, show_name

OTHER_PROMPT = "begin the assistant's turn differently from the chat template's own prompt for it"

ALL_TOOLS = Field("tools", "tools", ())

OPENING = (
    "learn what opens the assistant's turn too, since the chat template has no prompt for it "
    "(add_generation_prompt)"
)

OWN_PROMPT = (
    "have before the learned turn what the chat template's prompt has there; rendered with that "
    "turn, it has something else"
)


@dataclasses.dataclass(frozen=True)
class RenderedText:
    """A text to tokenize, and which of its characters are learned.

    Attributes:
        text: The whole row.
        spans: Characters ``[start, end)`` of each learned turn, in order.
        mask_source: What the spans come from: all, completion, markers, generation or prefix.
        plain: Whether the tokenizer adds its special tokens and EOS ends the row; a chat template
            writes its own.
        one_turn_per_span: Whether each span is one turn, and so must end in a stop token.
        notes: Lines about such rows, printed with their number.
        words_ends: The first character of each span at which its stop token may begin.
        inside: The special tokens inside learned answers, before their end, by message.
    """

    text: str
    spans: tuple[Span, ...]
    mask_source: str
    plain: bool
    one_turn_per_span: bool = True
    notes: tuple[str, ...] = ()
    words_ends: tuple[int, ...] = ()
    inside: Mapping[int, Set[int]] = dataclasses.field(default_factory=dict)

    def with_notes(self, *notes: str) -> "RenderedText":
        """Returns the same with more notes."""
        return dataclasses.replace(self, notes=tuple(dict.fromkeys((*self.notes, *notes))))


class RewrittenError(RowError):
    """A turn whose rendering differs from its rendering as the last turn."""


@dataclasses.dataclass(frozen=True)
class Rendering:
    """A conversation and its rendering by a chat template.

    Attributes:
        template: The Jinja source.
        talk: The conversation.
        found: Its rendering.
        config: Decides what is learned, and what may be left out.
        tokenizer: The tokenizer of the rows.
        special: Its special tokens.
    """

    template: str
    talk: Conversation
    found: Rendered
    config: DataConfig
    tokenizer: Tokenizer
    special: SpecialTexts

    def read(self) -> RenderedText:
        """Returns the text with its learned turns.

        Raises:
            RewrittenError: If a learned turn is rendered otherwise than as the last turn.
            RowError: If the template leaves something out, or a turn cannot be determined.
        """
        check_unicode(self.found.text, "the rendered conversation")
        try:
            rendered = self._find_turns()
        except RewrittenError:
            raise
        except RowError:  # lost texts are reported first
            self._refuse_lost(self.found.text)
            raise
        self._refuse_lost(rendered.text)
        if self.config.loss_on != "all":
            self._refuse_cut(rendered)
        self.special.refuse_begin(self.talk.messages, rendered.text)
        answers = self.talk.replies if self.config.loss_on == "all" else self._learned

        def tokens_of(index):
            return self.special.inside(self.talk.messages[index], rendered.text)

        rendered = dataclasses.replace(
            rendered,
            words_ends=self._words_ends(rendered),
            inside={i: tokens_of(i) for i in answers},
        )
        return rendered.with_notes(*map(tell_ignored, self._allowed(rendered.text)))

    @functools.cached_property
    def _ignored(self) -> set[str]:
        return set(self.config.ignore) - set(NEEDED)

    @functools.cached_property
    def _all_fields(self) -> list[Field]:
        """Every text of the messages, with special tokens blanked out."""
        return self.special.hidden(fields_of(self.talk.messages))

    @functools.cached_property
    def _all_of_tools(self) -> list[Field]:
        """Every text of the tools, likewise."""
        return self.special.hidden(fields_of_tools(self.talk.tools or ()))

    @functools.cached_property
    def _fields(self) -> list[Field]:
        """The fields of the messages that must be in the rendering."""
        return [field for field in self._all_fields if field.name not in self._ignored]

    def _allowed(self, text: str) -> list[str]:
        """Returns the fields and keys that the template may leave out, and does."""
        if not self._ignored:
            return []
        fields = [f for f in (*self._all_of_tools, *self._all_fields) if f.name in self._ignored]
        lost = lost_fields(fields, self.special.hide(text))
        unread = unread_tool_keys(self.talk.tools or (), self.template, text)
        return [*(field.name for field in lost), *(key for key in unread if key in self._ignored)]

    @functools.cached_property
    def _words(self) -> str:
        """The rendering with its special tokens blanked out."""
        return self.special.hide(self.found.text)

    @functools.cached_property
    def _ends(self) -> TurnEnds:
        learns_all = self.config.loss_on == "all"
        texts = (self._words, self._fields)
        return TurnEnds(
            self.template, self.talk, self.found, *texts, self.special.pattern, learns_all
        )

    @functools.cached_property
    def _learned(self) -> tuple[int, ...]:
        return self.talk.learned_replies(self.config.loss_on)

    @property
    def _is_last_alone(self) -> bool:
        """Whether one turn is learned, and nothing follows it."""
        return self._learned == (len(self.talk.messages) - 1,)

    def _words_ends(self, rendered: RenderedText) -> tuple[int, ...]:
        """Returns where the words of each span end; 0 where their order is unknown."""
        if not rendered.one_turn_per_span or self.config.loss_on == "all":
            return ()
        words = self.special.hide(rendered.text)
        pairs = zip(self._learned, rendered.spans, strict=True)
        found = (
            (end_of_fields(self._ends.fields_of(index), words[:end], start) or 0)
            for index, (start, end) in pairs
        )
        return tuple(found)

    def _refuse_lost(self, text: str) -> None:
        """Refuses a row if the template leaves out a text, or does not read a key."""
        talk = self.talk
        unread = unread_keys(talk.messages, self.template)
        lost = self._lost(text, unread)
        if ALL_TOOLS not in lost:
            keys = unread_tool_keys(talk.tools or (), self.template, text)
            unread += [key for key in keys if key not in self._ignored]
        if (lost or unread) and not self._is_last_alone and self.config.loss_on != "all":
            raise RewrittenError("the chat template leaves something out")
        if lost or unread:
            raise LostError(lost, unread)
        read = read_variables(self.template) if talk.template_kwargs else ()
        kwargs = [show_name(name) for name in talk.template_kwargs if name not in read]
        if kwargs:
            raise RowError(
                f"the chat template does not read {', '.join(kwargs)} of chat_template_kwargs: "
                "remove what it does not read, or allow the column with data.ignore: "
                "[chat_template_kwargs]"
            )

    def _lost(self, text: str, unread: Collection[str]) -> list[Field]:
        """Returns the required fields that a rendering leaves out, without keys that are `unread`.

        `ALL_TOOLS` is returned if it writes no tools.
        """
        text = self.special.hide(text)
        elsewhere = self.talk.elsewhere
        tools = [field for field in self._all_of_tools if field.name not in self._ignored]
        # Answers that are learned in another row may be rewritten here.
        fields = [
            field
            for field in self._fields
            if field.name not in unread
            if field.message not in elsewhere or not lost_fields([field], text)
        ]
        # Templates write tools before the conversation, or after its first message.
        first = sum(field.message == 0 for field in fields)
        behind = [*fields[:first], *tools, *fields[first:]]
        if tools and end_of_fields(behind, text, 0) is not None:
            return []
        lost = [f for f in lost_fields([*tools, *fields], text) if f.message not in elsewhere]
        names = {field for field in tools if field.name == "tools.name"}
        if names and names.issubset(lost):
            return [ALL_TOOLS, *(field for field in lost if field.message is not None)]
        return lost

    def _refuse_cut(self, rendered: RenderedText) -> None:
        """Refuses learned turns that do not hold the assistant's whole text."""
        parts = [self.special.hide(rendered.text[start:end]) for start, end in rendered.spans]
        if not rendered.one_turn_per_span:
            parts = ["\0".join(parts)] * len(self._learned)
        for index, part in zip(self._learned, parts, strict=True):
            if lost := lost_fields(self._ends.fields_of(index), part):
                if not self._is_last_alone:
                    raise RewrittenError(f"the chat template rewrites messages[{index}]")
                raise LostError(lost, ())

    def _find_turns(self) -> RenderedText:
        text = self.found.text
        loss_on = self.config.loss_on
        if loss_on == "all":
            last = len(self.talk.messages) - 1
            before = [field for field in self._fields if field.message != last]
            after = end_of_fields(before, self._words, 0) or 0
            end = self._ends.unasked(last, after) or len(text)
            return RenderedText(text, ((0, end),), "all", plain=False)
        if self.config.response_part is not None:
            spans = spans_between_markers(self.talk, text, self.config, self.tokenizer)
            size = self._ends.of_conversation(self._learned[-1], spans[-1][0])
            ends = [min(end, size) for _, end in spans]
            pairs = zip(self._learned, spans, ends, strict=True)
            up_to_stop = self._ends.up_to_stop
            spans = tuple((start, up_to_stop(i, start, end)) for i, (start, _), end in pairs)
            return RenderedText(text[:size], spans, "markers", plain=False)
        if GENERATION.search(self.template):
            return self._by_generation()
        starts = [self._start(index) for index in self._learned]
        if None in starts and not self._is_last_alone:
            raise RewrittenError("the chat template rewrites the text before a learned turn")
        if None in starts:
            return self._as_prompted()
        pairs = list(zip(self._learned, starts, strict=True))
        spans = tuple((start, self._end(index, start)) for index, start in pairs if start)
        opened = [self._ends.is_opened(index, start) for index, start in pairs if start]
        notes = () if all(opened) else (OPENING,)
        text = text[: self._ends.of_conversation(*pairs[-1])]
        return RenderedText(text, spans, "prefix", plain=False, notes=notes)

    def _start(self, index: int) -> int | None:
        """Returns where message `index` starts: where its prompt, a prefix of the text, ends."""
        if index == 0:
            raise RowError(
                "messages[0] is an assistant turn, and nothing before it shows where it starts; "
                f"set data.leading_answer to trim or drop, or {self._other_ways}"
            )
        return self.found.prefixes[Part(index, is_prompt=True)]

    def _as_prompted(self) -> RenderedText:
        """Returns the last turn after its prompt, where the text does not continue the prompt.

        If the turn follows the same words in the text, the row gets the prompt as the model sees it
        when it writes the turn. Otherwise the prompt opens the turn with more than a finished turn
        has, such as a thought, and the turn stays where it is.
        """
        (index,) = self._learned
        text = self.found.text
        prompt = self.found.others[Part(index, is_prompt=True)]
        if start := self._start_behind(prompt, index):
            end = self._end(index, start)
            size = self._ends.of_conversation(index, start)
            spans = ((len(prompt), len(prompt) + end - start),)
            text = prompt + text[start:size]
            return RenderedText(text, spans, "prefix", plain=False, notes=(OWN_PROMPT,))
        if start := self._start_of_words(index):
            spans = ((start, self._end(index, start)),)
            size = self._ends.of_conversation(index, start)
            return RenderedText(text[:size], spans, "prefix", plain=False, notes=(OTHER_PROMPT,))
        raise RowError(
            f"the chat template renders the text before messages[{index}] (assistant) differently "
            "with it and without it, so the turn's tokens cannot be determined; "
            f"{self._other_ways}"
        )

    def _start_behind(self, prompt: str, index: int) -> int | None:
        """Returns where a turn starts: in the text, after the end of the prompt.

        That end is the words of the message before the turn and the opening of the turn.
        """
        before = [field for field in fields_of(self.talk.messages) if field.message == index - 1]
        if not before:
            return None
        end, words = max((prompt.rfind(form), form) for form in forms(before[-1].texts[-1]))
        opening = prompt[end + len(words) :]
        if end < 0 or not opening.strip():
            return None
        text = self.found.text
        limit = len(self.found.text)
        while (found := text.rfind(words + opening, 0, limit)) >= 0:
            start = found + len(words + opening)
            if not lost_fields(self._ends.fields_of(index), self._words[start:]):
                return start
            limit = start - 1
        return None

    def _start_of_words(self, index: int) -> int | None:
        """Returns where a turn's words start, if its prompt and the text are alike up to there."""
        text = self._words
        alike = self.found.shared[Part(index, is_prompt=True)]
        fields = self._ends.fields_of(index)
        words = next((words for field in fields for words in field.texts), None)
        if words is None:
            return None
        if text[alike:].lstrip().startswith(words):
            return alike
        # The words may begin like the rest of the prompt by chance.
        places = range(alike - 1, max(alike - len(words), 0), -1)
        return next((place for place in places if text.startswith(words, place)), None)

    def _end(self, index: int, start: int) -> int:
        """Returns where a turn ends."""
        end = self._ends.of_turn(index, start)
        if end is None:
            raise RewrittenError(f"the chat template rewrites messages[{index}]")
        return end

    @property
    def _other_ways(self) -> str:
        marked = (
            "a data.chat_template that marks what the assistant writes with {% generation %}: put "
            "the tag before it and {% endgeneration %} after its stop token"
        )
        first = self.talk.replies[0]
        if {"user", "assistant"}.issuperset(item["role"] for item in self.talk.messages[first:]):
            return f"give data.instruction_part and data.response_part, or {marked}"
        return f"give {marked}"

    def _by_generation(self) -> RenderedText:
        text = self.found.text
        replies = self.talk.replies
        spans = tuple((start, end) for start, end in self.found.blocks if start < end)
        if len(spans) != len(replies):
            spans = _join_adjacent(spans)
        if not spans:
            raise RowError(
                f"the chat template's {{% generation %}} blocks mark nothing in {len(replies)} "
                "assistant turns"
            )
        if len(spans) == len(replies):
            pairs = zip(replies, spans, strict=True)
            chosen = tuple(span for i, span in pairs if i in self._learned)
            return RenderedText(text, chosen, "generation", plain=False)
        if len(self._learned) < len(replies):
            raise RowError(
                f"the chat template marks {len(spans)} {{% generation %}} blocks for "
                f"{len(replies)} assistant turns, so it is unknown which block belongs to the "
                f"{len(self._learned)} turns to learn; give data.instruction_part and "
                "data.response_part"
            )
        return RenderedText(text, spans, "generation", plain=False, one_turn_per_span=False)


def _join_adjacent(spans: Sequence[Span]) -> tuple[Span, ...]:
    joined: list[Span] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return tuple(joined)
