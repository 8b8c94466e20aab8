"""Conversations rendered by a chat template, and the characters in them that are learned."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lorax.config import DataConfig
from lorax.data.formats import Conversation, Message
from lorax.data.renderer import RENDERER, Part, Rendered, Request, Span
from lorax.data.rows import DataError
from lorax.data.tokenizer import Tokenizer

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
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
    """

    text: str
    spans: tuple[Span, ...]
    mask_source: str
    plain: bool
    one_turn_per_span: bool = True


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template and the settings that say what is learned in what it renders.

    Spans come from the first of these that there is: the markers of the config, the template's
    ``{% generation %}`` blocks, renderings of the first messages alone.
    """

    tokenizer: Tokenizer
    config: DataConfig
    file_template: str | None = None

    def render(self, conversations: Sequence[Conversation]) -> Iterator[RenderedText]:
        """Renders conversations, in order, and finds the turns to learn.

        Raises:
            DataError: In its turn, if the template fails, or the turns cannot be told apart for
                certain.
        """
        for template, group in itertools.groupby(conversations, self.template_of):
            marked = bool(_GENERATION.search(template))
            asked = [(conversation, self._turns(conversation, marked)) for conversation in group]
            rendered = RENDERER.render(
                template,
                [Request(talk.messages, _parts(talk, turns), talk.tools) for talk, turns in asked],
                special_tokens=self.tokenizer.special_tokens_map,
                mark_generation=marked,
            )
            for (conversation, turns), found in zip(asked, rendered, strict=True):
                _refuse_lost_functions(conversation, found.text)
                yield self._find_turns(conversation, turns, marked, found)

    def _turns(self, conversation: Conversation, marked: bool) -> tuple[int, ...]:
        """Returns the messages whose turns only renderings of the first messages can tell."""
        if self.config.loss_on == "all" or self.config.response_part is not None or marked:
            return ()
        return conversation.learned_replies(self.config.loss_on)

    def _find_turns(
        self, conversation: Conversation, turns: tuple[int, ...], marked: bool, found: Rendered
    ) -> RenderedText:
        text, blocks, prefixes = found
        if self.config.loss_on == "all":
            return RenderedText(text, ((0, len(text)),), "all", plain=False)
        if self.config.response_part is not None:
            return RenderedText(text, self._by_markers(conversation, text), "markers", plain=False)
        if marked:
            return self._by_generation(conversation, text, blocks)
        spans = tuple(_added_by(prefixes, index) for index in turns)
        return RenderedText(text, spans, "prefix", plain=False)

    def template_of(self, conversation: Conversation) -> str:
        """Returns the template of a conversation: a tokenizer may have one for tools.

        Raises:
            DataError: If the tokenizer has none that fits.
        """
        if self.file_template is not None:
            return self.file_template
        try:
            return self.tokenizer.get_chat_template(None, conversation.tools)
        except ValueError as error:
            raise DataError(
                "the row is a conversation and the tokenizer has no chat template for it; set "
                f"data.chat_template to the path of a .jinja file ({error})"
            ) from error

    def _by_generation(
        self, conversation: Conversation, text: str, blocks: list[Span]
    ) -> RenderedText:
        replies = conversation.replies
        spans = _without_empty(blocks)
        if len(spans) != len(replies):
            spans = _join_adjacent(spans)
        if not spans:
            raise DataError(
                f"the chat template's {{% generation %}} blocks mark nothing in {len(replies)} "
                "assistant turns"
            )
        learned = conversation.learned_replies(self.config.loss_on)
        if len(spans) == len(replies):
            chosen = tuple(span for i, span in zip(replies, spans, strict=True) if i in learned)
            return RenderedText(text, chosen, "generation", plain=False)
        if len(learned) < len(replies):
            raise DataError(
                f"the chat template marks {len(spans)} {{% generation %}} blocks for "
                f"{len(replies)} assistant turns, so it cannot be told which block belongs to the "
                f"{len(learned)} turns to learn; give data.instruction_part and "
                "data.response_part"
            )
        return RenderedText(text, spans, "generation", plain=False, one_turn_per_span=False)

    def _by_markers(self, conversation: Conversation, text: str) -> tuple[Span, ...]:
        instruction, response = self.config.instruction_part, self.config.response_part
        assert instruction is not None and response is not None
        starts = [match.end() for match in re.finditer(re.escape(response), text)]
        ends = [match.start() for match in re.finditer(re.escape(instruction), text)]
        for name, part, places in (
            ("response_part", response, starts),
            ("instruction_part", instruction, ends),
        ):
            if not places:
                raise DataError(
                    f"data.{name} {part!r} stands nowhere in the rendered row, whose special "
                    f"tokens are {' '.join(self._special_tokens_of(text)) or 'none at all'}"
                )
        _check_markers(conversation, starts, ends)
        borders = sorted([start - len(response) for start in starts] + ends + [len(text)])
        spans = [(start, next(end for end in borders if end >= start)) for start in starts]
        learned = conversation.learned_replies(self.config.loss_on)
        return tuple(
            span for i, span in zip(conversation.replies, spans, strict=True) if i in learned
        )

    def _special_tokens_of(self, text: str) -> list[str]:
        """Returns the special tokens that a text has, in its order; nothing else of the text."""
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        names = sorted(added | set(self.tokenizer.all_special_tokens), key=len, reverse=True)
        found = re.findall("|".join(map(re.escape, names)), text) if names else []
        return list(dict.fromkeys(found))


def _refuse_lost_functions(conversation: Conversation, text: str) -> None:
    """Refuses a row whose tools, or calls of them, the template leaves out."""
    lost = len([name for name in conversation.functions if name not in text])
    if lost:
        raise DataError(
            f"the chat template leaves out {lost} functions of the row's tools and tool_calls: "
            "take a template that writes them, or remove them from the row"
        )


def load_chat_template(tokenizer: Tokenizer, config: DataConfig) -> ChatTemplate | None:
    """Returns the template that `config.chat_template` names, or None if the tokenizer has none.

    Raises:
        DataError: If the file is missing, empty, or no text.
    """
    if config.chat_template == "tokenizer":
        return ChatTemplate(tokenizer, config) if tokenizer.chat_template else None
    try:
        template = Path(config.chat_template).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.chat_template {config.chat_template!r}: {error}") from error
    if not template.strip():
        raise DataError(f"data.chat_template {config.chat_template!r}: the file is empty")
    return ChatTemplate(tokenizer, config, template)


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Returns the token ids of messages up to where the assistant's turn begins.

    Raises:
        DataError: If the tokenizer has no chat template, or it fails.
    """
    if tokenizer.chat_template is None:
        raise DataError("the tokenizer has no chat template")
    template = tokenizer.get_chat_template(None, None)
    names = tokenizer.special_tokens_map
    prompt = Part(len(messages), is_prompt=True)
    request = Request(messages, (prompt,))
    (rendered,) = RENDERER.render(template, [request], special_tokens=names)
    ids = tokenizer(rendered.text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids  # pyright: ignore[reportReturnType]


def _check_markers(conversation: Conversation, starts: list[int], ends: list[int]) -> None:
    """Refuses a row in which the markers cannot bound every assistant turn."""
    replies = conversation.replies
    later = [message["role"] for message in conversation.messages[replies[0] :]]
    for role in later:
        if role not in ("user", "assistant"):
            raise DataError(
                f"there is a {role} turn after an assistant turn, and data.instruction_part marks "
                "user turns only; use a data.chat_template with {% generation %}"
            )
    found = sum(end >= starts[0] for end in ends)
    if len(starts) != len(replies) or found != later.count("user"):
        raise DataError(
            f"data.response_part stands {len(starts)} times in the rendered row and "
            f"data.instruction_part {found} times after it, but there are {len(replies)} assistant "
            f"turns and {later.count('user')} user turns after the first of them"
        )


def _parts(conversation: Conversation, turns: tuple[int, ...]) -> tuple[Part, ...]:
    """Returns the whole, and for each turn what is before it and what ends with it."""
    parts = {Part(len(conversation.messages)): None}  # a set that keeps its order
    for index in turns:
        parts |= {Part(index, is_prompt=True): None, Part(index + 1): None}
    return tuple(part for part in parts if part.length)


def _added_by(prefixes: Mapping[Part, int | None], index: int) -> Span:
    """Returns the characters that message `index` adds, if that can be told for certain."""
    if index == 0:
        raise DataError(
            "messages[0] is an assistant turn, and nothing before it shows where it starts; "
            f"{_OTHER_WAYS}"
        )
    before, upto = prefixes[Part(index, is_prompt=True)], prefixes[Part(index + 1)]
    if before is None or upto is None or before >= upto:
        raise DataError(
            f"the chat template is not prefix-preserving: what it renders up to messages"
            f"[{index}] (assistant) alone differs from that part of the whole conversation, "
            f"so the turn's tokens cannot be told for certain; {_OTHER_WAYS}, or set "
            "data.loss_on: last_assistant if only earlier turns are rewritten"
        )
    return before, upto


def _without_empty(blocks: Sequence[Span]) -> tuple[Span, ...]:
    return tuple((start, end) for start, end in blocks if start < end)


def _join_adjacent(spans: Sequence[Span]) -> tuple[Span, ...]:
    joined: list[Span] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return tuple(joined)
