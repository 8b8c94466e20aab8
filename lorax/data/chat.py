"""Conversations rendered by a chat template, and the characters in them that are learned."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from lorax.config import DataConfig
from lorax.data.conversation import Conversation, Message
from lorax.data.renderer import RENDERER, Part, Rendered, Request
from lorax.data.rows import DataError, RowError
from lorax.data.tokenizer import Tokenizer
from lorax.data.turns import GENERATION, RenderedText, Rendering, RewrittenError
from lorax.small_files import SmallFileError, read_small_file

REWRITTEN = "became one row per learned turn: the chat template rewrites earlier turns"


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template and the settings that say what is learned in what it renders.

    Spans come from the first of these that there is: the markers of the config, the template's
    ``{% generation %}`` blocks, renderings of the first messages alone. Where a template rewrites
    earlier turns, each learned turn becomes a row of its own, in which it is the last one: what the
    model sees when it writes that turn.
    """

    tokenizer: Tokenizer
    config: DataConfig
    file_template: str | None = None

    def render(
        self, conversations: Sequence[Conversation]
    ) -> Iterator[list[RenderedText] | RowError]:
        """Renders conversations, in order, and finds the turns to learn.

        Yields:
            The rows that a conversation becomes; or what is wrong with it: the template fails,
            leaves something out, or the turns cannot be told apart for certain.
        """
        for template, group in itertools.groupby(conversations, self.template_of):
            talks = list(group)
            tried = self._try(template, talks)
            again = [
                (i, talk.ending_with(turn))
                for i, (talk, found) in enumerate(zip(talks, tried, strict=True))
                if isinstance(found, RewrittenError)
                for turn in talk.learned_replies(self.config.loss_on)
            ]
            apart: dict[int, list[RenderedText | RowError]] = {}
            rendered = self._try(template, [talk for _, talk in again])
            for (i, _), found in zip(again, rendered, strict=True):
                apart.setdefault(i, []).append(found)
            for i, found in enumerate(tried):
                yield _gather(apart[i]) if i in apart else _gather([found])

    def asks_for_date(self, conversation: Conversation) -> bool:
        """Says whether the template of a conversation writes today's date."""
        return "strftime_now" in self.template_of(conversation)

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

    def _try(self, template: str, talks: Sequence[Conversation]) -> list[RenderedText | RowError]:
        """Renders each conversation as a whole; a failure comes in its place."""
        found = self._render(template, talks)
        # Some templates join the arguments of a call to their text, others take them apart.
        failed = [
            i for i, item in enumerate(found) if isinstance(item, RowError) and _calls(talks[i])
        ]
        texts = [talks[i].with_arguments_as_text() for i in failed]
        for i, item in zip(failed, self._render(template, texts), strict=True):
            found[i] = found[i] if isinstance(item, RowError) else item
        return [
            item if isinstance(item, RowError) else self._read(template, talk, item)
            for talk, item in zip(talks, found, strict=True)
        ]

    def _read(self, template: str, talk: Conversation, found: Rendered) -> RenderedText | RowError:
        try:
            return Rendering(template, talk, found, self.config, self.tokenizer).read()
        except RowError as error:
            return error

    def _render(self, template: str, talks: Sequence[Conversation]) -> list[Rendered | RowError]:
        marked = bool(GENERATION.search(template))
        requests = [
            Request(
                talk.messages,
                _parts(talk, self._turns(talk, marked)),
                talk.tools,
                talk.template_kwargs,
            )
            for talk in talks
        ]
        rendered = RENDERER.render(
            template,
            requests,
            special_tokens=self.tokenizer.special_tokens_map,
            date=self.config.date,
            mark_generation=marked,
        )
        return list(rendered)

    def _turns(self, conversation: Conversation, marked: bool) -> tuple[int, ...]:
        """Returns the messages whose turns only renderings of the first messages can tell."""
        if self.config.loss_on == "all" or self.config.response_part is not None or marked:
            return ()
        return conversation.learned_replies(self.config.loss_on)


def read_own_template(config: DataConfig) -> str | None:
    """Returns the text of the template file that the settings name; None if it is the tokenizer's.

    Raises:
        DataError: If the file is missing, empty, or no text.
    """
    if config.chat_template == "tokenizer":
        return None
    where = f"data.chat_template: {config.chat_template}"
    try:
        template = read_small_file(config.chat_template).decode("utf-8-sig")
    except SmallFileError as error:
        raise DataError(f"{where}: {error}; needed is the path of a .jinja file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start} is not UTF-8") from error
    if not template.strip():
        raise DataError(f"{where}: the file is empty")
    return template


def load_chat_template(tokenizer: Tokenizer, config: DataConfig) -> ChatTemplate | None:
    """Returns the template that the settings name, or None if the tokenizer has none.

    Raises:
        DataError: If a file is named that cannot be read.
    """
    own = read_own_template(config)
    if own is None and not tokenizer.chat_template:
        return None
    return ChatTemplate(tokenizer, config, own)


def encode_prompt(
    tokenizer: Tokenizer, messages: Sequence[Message], date: str | None = None
) -> list[int]:
    """Returns the token ids of messages up to where the assistant's turn begins.

    Args:
        tokenizer: With a chat template.
        messages: What was said so far.
        date: What a template that asks for the day is told, as ``2026-11-30``; None is today.

    Raises:
        DataError: If the tokenizer has no chat template, or it fails.
    """
    if tokenizer.chat_template is None:
        raise DataError("the tokenizer has no chat template")
    template = tokenizer.get_chat_template(None, None)
    names = tokenizer.special_tokens_map
    prompt = Part(len(messages), is_prompt=True)
    request = Request(messages, (prompt,))
    (rendered,) = RENDERER.render(template, [request], special_tokens=names, date=date)
    if isinstance(rendered, RowError):
        raise rendered
    ids = tokenizer(rendered.text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids  # pyright: ignore[reportReturnType]


def _gather(found: Sequence[RenderedText | RowError]) -> list[RenderedText] | RowError:
    """Returns the rows that a conversation becomes, or what is wrong with the first that is not."""
    rows: list[RenderedText] = []
    for item in found:
        if isinstance(item, RowError):
            return item
        rows.append(item)
    if len(rows) > 1:
        rows[0] = dataclasses.replace(rows[0], notes=(*rows[0].notes, REWRITTEN))
    return rows


def _calls(talk: Conversation) -> bool:
    return any(message.get("tool_calls") for message in talk.messages)


def _parts(conversation: Conversation, turns: tuple[int, ...]) -> tuple[Part, ...]:
    """Returns the whole, and for each turn what is before it and what ends with it."""
    parts = {Part(len(conversation.messages)): None}  # a set that keeps its order
    for index in turns:
        parts |= {Part(index, is_prompt=True): None, Part(index + 1): None}
    return tuple(part for part in parts if part.length)
