"""The learned turns in a rendered conversation: by markers, generation blocks, or prefixes."""

import dataclasses
import functools
import re
from collections.abc import Sequence

from lorax.config import DataConfig
from lorax.data.conversation import Conversation
from lorax.data.lost import Field, end_of_fields, fields_of, lost_fields, refuse_lost, unread_keys
from lorax.data.markers import spans_between_markers
from lorax.data.renderer import Part, Rendered, Span
from lorax.data.rows import RowError, check_unicode, show_name
from lorax.data.tokenizer import Tokenizer

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

OTHER_PROMPT = "begin the assistant's turn otherwise than the chat template's own prompt for it"

_OTHER_WAYS = (
    "give data.instruction_part and data.response_part, or a data.chat_template that marks what "
    "the assistant writes with {% generation %}"
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
        notes: What is told of such rows, with their number.
    """

    text: str
    spans: tuple[Span, ...]
    mask_source: str
    plain: bool
    one_turn_per_span: bool = True
    notes: tuple[str, ...] = ()


class RewrittenError(RowError):
    """A turn that a rendering does not hold as it is when it is the last one."""


@dataclasses.dataclass(frozen=True)
class Rendering:
    """A conversation and what a chat template made of it.

    Attributes:
        template: In Jinja.
        talk: The conversation.
        found: What was rendered of it.
        config: Says what is learned, and what may be left out.
        tokenizer: Knows the special tokens.
    """

    template: str
    talk: Conversation
    found: Rendered
    config: DataConfig
    tokenizer: Tokenizer

    def read(self) -> RenderedText:
        """Returns the text with its learned turns.

        Raises:
            RewrittenError: If a learned turn is not here as it is when it is the last one.
            RowError: If the template leaves something out, or a turn cannot be told for certain.
        """
        check_unicode(self.found.text, "the rendered conversation")
        self._refuse_lost()
        rendered = self._find_turns()
        self._refuse_cut(rendered)
        return rendered

    @functools.cached_property
    def _fields(self) -> list[Field]:
        """What the rendering must hold."""
        fields = fields_of(self.talk.messages)
        return [field for field in fields if field.name not in self.config.ignore]

    @functools.cached_property
    def _learned(self) -> tuple[int, ...]:
        return self.talk.learned_replies(self.config.loss_on)

    def _of(self, index: int) -> list[Field]:
        return [field for field in self._fields if field.message == index]

    def _refuse_lost(self) -> None:
        """Refuses a row of which the template leaves out a text, or does not read a key."""
        talk, last = self.talk, len(self.talk.messages) - 1
        unread = unread_keys(talk.messages, self.template)
        # A turn that is rewritten here is looked at again where it is the last one; there the
        # turns before it are as the template means them to be.
        again = {i for i in self._learned if i < last or len(self._learned) > 1}
        if talk.turns is not None:
            again = set(talk.replies) - set(talk.turns)
        lost = [
            field
            for field in lost_fields(self._fields, self.found.text)
            if field.name not in unread and field.message not in again
        ]
        refuse_lost(lost, unread)
        functions = [name for name in talk.functions if name not in self.found.text]
        if functions:
            raise RowError(
                f"the chat template leaves out {len(functions)} functions of the row's tools and "
                "tool_calls: take a template that writes them, or remove them from the row"
            )
        is_named = lambda name: re.search(rf"\b{re.escape(name)}\b", self.template)
        kwargs = [show_name(name) for name in talk.template_kwargs if not is_named(name)]
        if kwargs:
            raise RowError(
                f"the chat template does not read {', '.join(kwargs)} of chat_template_kwargs: "
                "remove what it does not read, or allow the column with data.ignore: "
                "[chat_template_kwargs]"
            )

    def _refuse_cut(self, rendered: RenderedText) -> None:
        """Refuses learned turns that do not hold what the assistant says, whole."""
        if rendered.one_turn_per_span and rendered.mask_source != "all":
            spans = dict(zip(self._learned, rendered.spans, strict=True))
        else:
            whole = rendered.spans[0][0], rendered.spans[-1][1]
            spans = dict.fromkeys(self._learned, whole)
        for index, (start, end) in spans.items():
            if lost := lost_fields(self._of(index), rendered.text[start:end]):
                if len(self._learned) > 1 or index < len(self.talk.messages) - 1:
                    raise RewrittenError(f"the chat template rewrites messages[{index}]")
                refuse_lost(lost, ())

    def _find_turns(self) -> RenderedText:
        text, loss_on = self.found.text, self.config.loss_on
        if loss_on == "all":
            end = self._end_of_turn(len(self.talk.messages) - 1, 0) or len(text)
            return RenderedText(text, ((0, end),), "all", plain=False)
        if self.config.response_part is not None:
            spans = spans_between_markers(self.talk, text, self.config, self.tokenizer)
            return RenderedText(text, spans, "markers", plain=False)
        if GENERATION.search(self.template):
            return self._by_generation()
        turns = [self._turn(index) for index in self._learned]
        notes = tuple(dict.fromkeys(note for _, note in turns if note))
        spans = tuple(span for span, _ in turns)
        return RenderedText(text, spans, "prefix", plain=False, notes=notes)

    def _turn(self, index: int) -> tuple[Span, str]:
        """Returns the characters that message `index` adds, and what is to be told of them."""
        if index == 0:
            raise RowError(
                "messages[0] is an assistant turn, and nothing before it shows where it starts; "
                f"set data.leading_answer to trim or drop, or {_OTHER_WAYS}"
            )
        found, note = self.found, ""
        prompt, is_last = Part(index, is_prompt=True), index == len(self.talk.messages) - 1
        start, upto = found.prefixes[prompt], found.prefixes[Part(index + 1)]
        if start is None and is_last:
            # The prompt opens the turn with more than a finished turn has, such as a thought.
            words = next((words for field in self._of(index) for words in field.texts), None)
            rest = found.text[found.shared[prompt] :].lstrip()
            if words is not None and rest.startswith(words):
                start, note = found.shared[prompt], OTHER_PROMPT
        if start is not None:
            end = self._end_of_turn(index, start) or upto
            if end is not None and start < end:
                return (start, end), note
        if not is_last:
            raise RewrittenError(f"the chat template rewrites messages[{index}]")
        raise RowError(
            f"the chat template renders what stands before messages[{index}] (assistant) otherwise "
            "without it than with it, so the turn's tokens cannot be told for certain; "
            f"{_OTHER_WAYS}"
        )

    def _end_of_turn(self, index: int, start: int) -> int | None:
        """Returns where a turn ends behind which the template opens the next one unasked.

        What such a template adds is no part of the turn; its stop token follows the words.
        """
        fields = self._of(index)
        if "add_generation_prompt" in self.template or not fields:
            return None
        if any(field.name.endswith(".tool_calls") for field in fields):
            return None
        text = self.found.text
        end = end_of_fields(fields, text, start)
        return None if end is None else len(text) - len(text[end:].lstrip())

    def _by_generation(self) -> RenderedText:
        text, replies = self.found.text, self.talk.replies
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
                f"{len(replies)} assistant turns, so it cannot be told which block belongs to the "
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
