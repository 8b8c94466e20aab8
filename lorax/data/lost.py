"""What of a conversation a rendering holds: every text must be found in it again."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from lorax.data.conversation import Message
from lorax.data.rows import RowError, is_word

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message's thinking; transformers hands each of them to a template under all names."""

THINKING = "assistant.thinking"

NEEDED = ("assistant.content", "assistant.tool_calls")
"""What no setting can leave out: it is what is learned."""

_STRUCTURE = ("role", "content", "tool_calls", "tool_call_id", *REASONING_KEYS)
_THINKING_TAGS = re.compile(r"<think(?:ing)?>(.*?)</think(?:ing)?>", re.DOTALL)


class Field(NamedTuple):
    """A part of a message that the rendering should hold.

    Attributes:
        message: Index of the message.
        name: How `data.ignore` names what it is, such as ``developer.content``.
        texts: What to look for, in order.
    """

    message: int
    name: str
    texts: tuple[str, ...]

    @property
    def is_thinking(self) -> bool:
        """Whether it is what the assistant thinks before it answers."""
        return self.name == THINKING or self.name.removeprefix("message.") in REASONING_KEYS


def fields_of(messages: Sequence[Message]) -> list[Field]:
    """Returns the parts of all messages, in the order in which templates write them."""
    return [field for i, message in enumerate(messages) for field in _fields(i, message)]


def unread_keys(messages: Sequence[Message], template: str) -> list[str]:
    """Returns the keys of messages that the template does not name, as `data.ignore` does."""
    keys = dict.fromkeys(
        key
        for message in messages
        for key, value in message.items()
        if key not in ("role", "content", "tool_calls", "tool_call_id")
        and value not in ("", [], {})
    )
    is_named = lambda key: re.search(rf"\b{re.escape(key)}\b", template) is not None
    reads_thinking = any(map(is_named, REASONING_KEYS))
    read = lambda key: is_named(key) or (key in REASONING_KEYS and reads_thinking)
    return [f"message.{key}" if is_word(key) else "message.…" for key in keys if not read(key)]


def lost_fields(fields: Sequence[Field], text: str) -> list[Field]:
    """Returns the fields that are not whole in `text`.

    Each text must be found, white space at its ends aside, as it is or as in JSON: one after the
    other; or as often as all fields together hold it, where the template orders them otherwise.
    """
    position, doubtful = 0, list[str]()
    for field in fields:
        for words in field.texts:
            end = _end_of(words, text, position)
            if end is None:
                doubtful.append(words)
            else:
                position = end
    if not doubtful:
        return []
    # One that was found may have been found in another, which then is the doubtful one.
    everything = "\0".join(words for field in fields for words in field.texts)
    lost: list[Field] = []
    for words in dict.fromkeys(words for field in fields for words in field.texts):
        missing = everything.count(words) - sum(text.count(form) for form in forms(words))
        if missing > 0:
            # Which of several equal texts it is cannot be seen; users and assistants are always
            # written, so it is rather another's.
            holders = [field for field in fields if words in field.texts]
            holders.sort(key=lambda field: field.name.startswith(("user.", "assistant.content")))
            lost += holders[:missing]
    return list(dict.fromkeys(lost))


def end_of_fields(fields: Sequence[Field], text: str, start: int) -> int | None:
    """Returns where the last of the fields ends behind `start`, if they stand there in order."""
    position = start
    for words in (words for field in fields for words in field.texts):
        end = _end_of(words, text, position)
        if end is None:
            return None
        position = end
    return position


class LostError(RowError):
    """Texts that a rendering leaves out, and keys that the template does not read.

    Attributes:
        lost: What is left out.
        unread: The keys, as `data.ignore` names them.
    """

    def __init__(self, lost: Iterable[Field], unread: Iterable[str]) -> None:
        self.lost, self.unread = list(dict.fromkeys(lost)), list(dict.fromkeys(unread))
        places = [f"{_what(field)} of messages[{field.message}]" for field in self.lost]
        keys = [name.removeprefix("message.") for name in self.unread]
        said = [f"leaves out the {_listed(places)}"] * bool(places)
        said += [f"does not read the key {_listed(keys)}"] * bool(keys)
        names = list(dict.fromkeys([*(field.name for field in self.lost), *self.unread]))
        allowed = [name for name in names if name not in NEEDED]
        ways = ["set data.chat_template to one that writes them", "remove them from the row"]
        if allowed == names:
            ways.append(f"allow it by name with data.ignore: [{', '.join(allowed)}]")
        super().__init__(
            f"the chat template {' and '.join(said)}: {', '.join(ways[:-1])}, or {ways[-1]}"
        )


def _what(field: Field) -> str:
    owner, _, key = field.name.partition(".")
    return key if owner == "message" else f"{owner}'s {key.replace('_', ' ')}"


def _listed(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)


def _fields(index: int, message: Message) -> Iterator[Field]:
    role, content = message["role"], message.get("content") or ""
    for key in REASONING_KEYS:
        if words := tuple(_texts_in(message.get(key))):
            yield Field(index, f"message.{key}", words)
    if role == "assistant":
        position = 0
        for match in _THINKING_TAGS.finditer(content):
            yield from _field(index, "assistant.content", content[position : match.start()])
            yield from _field(index, THINKING, match[1])
            position = match.end()
        yield from _field(index, "assistant.content", content[position:])
    else:
        yield from _field(index, f"{role}.content", content)
    if words := tuple(_texts_of_calls(message.get("tool_calls") or ())):
        yield Field(index, f"{role}.tool_calls", words)
    for key, value in message.items():
        if key not in _STRUCTURE and (words := tuple(_texts_in(value))):
            yield Field(index, f"message.{key}", words)


def _field(index: int, name: str, content: str) -> Iterator[Field]:
    if words := content.strip():
        yield Field(index, name, (words,))


def _texts_of_calls(calls: Iterable[Any]) -> Iterator[str]:
    for call in calls:
        inner = call.get("function", call)
        yield inner["name"]
        arguments = inner.get("arguments")
        if isinstance(arguments, str):  # as a template asked for them: told apart when parsed
            arguments = json.loads(arguments)
        for name, value in (arguments or {}).items():
            yield name
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield json.dumps(value)
            yield from _texts_in(value)


def _texts_in(value: Any) -> Iterator[str]:
    """Yields every text in a JSON value that holds more than white space."""
    if isinstance(value, str):
        if value.strip():
            yield value.strip()
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts_in(item)


def forms(words: str) -> list[str]:
    """Returns a text as it is, and as it stands in JSON where that differs."""
    forms = [words, *(json.dumps(words, ensure_ascii=flag)[1:-1] for flag in (False, True))]
    return list(dict.fromkeys(forms))


def _end_of(words: str, text: str, start: int) -> int | None:
    """Returns where a text ends that is found behind `start`."""
    found = text.find(words, start)
    if found >= 0:
        return found + len(words)
    for form in forms(words)[1:]:
        if (found := text.find(form, start)) >= 0:
            return found + len(form)
    return None
