"""Conversations rendered by a chat template, and the characters in them that are learned."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from lorax.config.data import DataConfig
from lorax.data.chat.fields import fields_of
from lorax.data.chat.lost import LostError, lost_fields
from lorax.data.chat.renderer import RENDERER, Part, Rendered, RenderError, Request, TemplateError
from lorax.data.chat.special import SpecialTexts
from lorax.data.chat.template_names import GENERATION
from lorax.data.chat.tokenizer import Tokenizer
from lorax.data.chat.turns import RenderedText, Rendering, RewrittenError
from lorax.data.dataset import tell_ignored
from lorax.data.reading.conversation import INSTRUCTING, Conversation, Message
from lorax.data.reading.rows import DataError, RowError
from lorax.system.small_files import SmallFileError, read_small_file

REWRITTEN = "became one row per learned turn: the chat template rewrites earlier turns"

CUT_BEHIND = "were cut after their last learned turn: no learned turn sees what follows it"


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template, and the settings that decide what is learned of its rendering.

    Spans come from the first of these that exists: the markers of the config, the template's
    ``{% generation %}`` blocks, renderings of the first messages alone. Where a template rewrites
    earlier turns, each learned turn becomes a row of its own, in which it is the last one, as the
    model sees it when it writes that turn.
    """

    tokenizer: Tokenizer
    config: DataConfig
    file_template: str | None = None

    def render(
        self, conversations: Sequence[Conversation]
    ) -> Iterator[list[RenderedText] | RowError]:
        """Renders conversations, in order, and finds the turns to learn.

        Yields:
            The rows of a conversation; or its error: the template fails, leaves something out, or
            the turns cannot be determined.
        """
        for template, group in itertools.groupby(conversations, self.template_of):
            whole = list(group)
            talks = [talk.without_roles(self._left_out) for talk in whole]
            tried = self._try(template, talks)
            again = {
                i: talk.apart(self.config.loss_on)
                for i, (talk, found) in enumerate(zip(talks, tried, strict=True))
                if isinstance(found, RewrittenError)
            }
            rendered = iter(
                self._try(template, [part for parts in again.values() for part in parts])
            )
            for i, found in enumerate(tried):
                parts = again.get(i, [])
                rows = _gather([next(rendered) for _ in parts] or [found])
                if not isinstance(rows, RowError):
                    rows[0] = rows[0].with_notes(*self._notes(whole[i], talks[i], parts))
                yield rows

    def _notes(
        self, whole: Conversation, talk: Conversation, parts: Sequence[Conversation]
    ) -> Iterator[str]:
        """Yields the notes on a conversation that was split, or of which a part was left out."""
        if len(parts) > 1:
            yield REWRITTEN
        if parts and len(parts[-1].messages) < len(talk.messages):
            yield CUT_BEHIND
        roles = {message["role"] for message in whole.messages} & self._left_out
        yield from (tell_ignored(f"{role}.content") for role in sorted(roles))

    @functools.cached_property
    def _special(self) -> SpecialTexts:
        return SpecialTexts.of(self.tokenizer)

    @property
    def _left_out(self) -> set[str]:
        """The roles whose messages the config leaves out."""
        return {role for role in INSTRUCTING if f"{role}.content" in self.config.ignore}

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
        """Renders each conversation as a whole; yields the error of one that fails.

        Templates differ in how they want calls: a call without words with no content, an empty one
        or null; arguments as an object or as text. The first variant that loses nothing is used.
        """
        tried = self._try_arguments(template, talks)
        for empty in ("", None):
            failed = [i for i, item in enumerate(tried) if _is_failure(item) and talks[i].has_calls]
            again = [talks[i].with_empty_content(empty) for i in failed]
            for i, item in zip(failed, self._try_arguments(template, again), strict=True):
                # Of variants that fail, the first that names what is lost helps most.
                says_more = isinstance(item, LostError) and not isinstance(tried[i], LostError)
                if says_more or not _is_failure(item):
                    tried[i] = item
        return [
            self._advise(template, talk, item) if type(item) is RenderError else item
            for talk, item in zip(talks, tried, strict=True)
        ]

    def _try_arguments(
        self, template: str, talks: Sequence[Conversation]
    ) -> list[RenderedText | RowError]:
        found = self._render(template, talks)
        # Some templates join the arguments of a call to their text, others take them apart.
        failed = [
            i for i, item in enumerate(found) if isinstance(item, RowError) and talks[i].has_calls
        ]
        texts = [talks[i].with_arguments_as_text() for i in failed]
        for i, item in zip(failed, self._render(template, texts), strict=True):
            found[i] = found[i] if isinstance(item, RowError) else item
        return [
            item if isinstance(item, RowError) else self._read(template, talk, item)
            for talk, item in zip(talks, found, strict=True)
        ]

    def _advise(self, template: str, talk: Conversation, error: RowError) -> RowError:
        """Returns the error of a template that fails, with its remedy."""
        other = "set data.chat_template to one that can render such rows, or remove them"
        for remedy, less in _ways_out(talk):
            (found,) = self._render(template, [less])
            if not isinstance(found, RowError):
                return RenderError(f"{error}; {remedy}, or {other}")
        return RenderError(f"{error}; {other}")

    def _read(self, template: str, talk: Conversation, found: Rendered) -> RenderedText | RowError:
        try:
            settings = (self.config, self.tokenizer, self._special)
            return Rendering(template, talk, found, *settings).read()
        except RowError as error:
            return error

    def _render(self, template: str, talks: Sequence[Conversation]) -> list[Rendered | RowError]:
        marked = bool(GENERATION.search(template))
        requests = [
            Request(
                talk.messages,
                self._parts(template, talk),
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

    def _parts(self, template: str, talk: Conversation) -> tuple[Part, ...]:
        """Returns the parts to render: the whole, and prefixes that bound the learned turns."""
        length = len(talk.messages)
        learned = talk.learned_replies(self.config.loss_on)
        parts = {Part(length): None}  # a set that keeps its order
        if self.config.loss_on == "all" or GENERATION.search(template):
            return tuple(parts)
        for index in learned if self.config.response_part is None else ():
            parts |= {Part(index, is_prompt=True): None, Part(index + 1): None}
        if length - 1 in learned and "eos_token" in template:  # perhaps it ends conversations so
            parts |= {Part(length, is_prompt=True): None}
        return tuple(part for part in parts if part.length)


def read_own_template(config: DataConfig) -> str | None:
    """Returns the text of the template file that the settings name; None if it is the tokenizer's.

    Raises:
        DataError: If the file is missing, empty, or no text.
    """
    if config.chat_template == "tokenizer":
        return None
    return read_template(config.chat_template, f"data.chat_template: {config.chat_template}")


def read_template(path: str | Path, where: str | None = None) -> str:
    """Returns the text of a template file.

    Args:
        path: Path of the file.
        where: Its name in errors; the path if not given.

    Raises:
        DataError: If the file is missing, empty, or no text.
    """
    where = where or str(path)
    try:
        template = read_small_file(path).decode("utf-8-sig")
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
        tokenizer: A tokenizer with a chat template.
        messages: The conversation so far.
        date: The day for a template that asks for it, as ``2026-11-30``; None is today.

    Raises:
        DataError: If the tokenizer has no chat template, or it fails or leaves out a message.
    """
    if tokenizer.chat_template is None:
        raise DataError("the tokenizer has no chat template")
    template = tokenizer.get_chat_template(None, None)
    names = tokenizer.special_tokens_map
    prompt = Part(len(messages), is_prompt=True)
    request = Request(messages, (prompt,))
    try:
        (rendered,) = RENDERER.render(template, [request], special_tokens=names, date=date)
    except TemplateError as error:
        raise DataError(f"the chat template: {error}; fix it") from error
    if isinstance(rendered, RowError):
        raise rendered
    special = SpecialTexts.of(tokenizer)
    if lost := lost_fields(special.hidden(fields_of(messages)), special.hide(rendered.text)):
        names = " and the ".join(field.name.replace(".", "'s ") for field in lost)
        raise DataError(
            f"the chat template leaves out the {names}, so the model would not be asked that: "
            "leave it out too, or take a template that writes it"
        )
    ids = tokenizer(rendered.text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids  # pyright: ignore[reportReturnType]


def _ways_out(talk: Conversation) -> Iterator[tuple[str, Conversation]]:
    """Yields what a setting can leave out: the advice, and the rest of the conversation."""
    here = [role for role in INSTRUCTING if any(item["role"] == role for item in talk.messages)]
    for roles in [*([role] for role in here), here]:
        names = ", ".join(f"{role}.content" for role in roles)
        remedy = f"it renders what data.ignore: [{names}] leaves of the row: set that"
        if roles:
            yield remedy, talk.without_roles(roles)
    if talk.has_leading_answer:
        with contextlib.suppress(RowError):
            shorter = talk.without_leading_answer()
            yield "it renders what data.leading_answer: trim leaves of the row: set that", shorter


def _is_failure(item: RenderedText | RowError) -> bool:
    return isinstance(item, RowError) and not isinstance(item, RewrittenError)


def _gather(found: Sequence[RenderedText | RowError]) -> list[RenderedText] | RowError:
    """Returns the rows of a conversation, or the error that prevents them.

    Parts that several rows leave out are reported together; otherwise the first error is.
    """
    errors = [item for item in found if isinstance(item, RowError)]
    lossy = [item for item in errors if isinstance(item, LostError)]
    if errors and len(lossy) == len(errors):
        lost = (field for error in lossy for field in error.lost)
        return LostError(lost, (name for error in lossy for name in error.unread))
    if errors:
        return errors[0]
    return [item for item in found if isinstance(item, RenderedText)]
