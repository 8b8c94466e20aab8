"""The content of a row of messages: every text, and every key that a template must know."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

from lorax.data.reading.conversation import Message
from lorax.data.reading.rows import is_word

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message's thinking; transformers gives each of them to a template under all names."""

THINKING = "assistant.thinking"

NEEDED = ("assistant.content", "assistant.tool_calls")
"""Fields that no setting can leave out: they are learned."""

_STRUCTURE = ("role", "content", "tool_calls", "tool_call_id", *REASONING_KEYS)
_CALL_STRUCTURE = ("id", "type", "index", "function", "name", "arguments")
# The opening tag is missing where the prompt had it.
_THINKING_TAGS = re.compile(r"(?:<think(?:ing)?>|\A)(.*?)</think(?:ing)?>", re.DOTALL)

_NAMING = ("properties", "patternProperties", "$defs", "definitions")
"""Keys of a JSON schema whose own keys are names from the row."""

_REWORDED = ("type", "required", "$ref")
"""Keys of a JSON schema whose values a template may paraphrase, as ``city?: string``."""


class Field(NamedTuple):
    """A part of a row that the rendering should hold.

    Attributes:
        owner: The message or tool that it is a part of, such as ``messages[2]``.
        name: Its name in `data.ignore`, such as ``developer.content``.
        texts: The texts to find, in order.
        message: Index of the message; None for a part of a tool.
    """

    owner: str
    name: str
    texts: tuple[str, ...]
    message: int | None = None

    @property
    def rank(self) -> int:
        """Order in which fields of equal text are found: first those that all templates write."""
        if self.name in NEEDED or self.name.startswith("user."):
            return 0
        return 2 if self.name.startswith("message.") else 1

    @property
    def is_thinking(self) -> bool:
        """Whether it is the assistant's thinking before an answer."""
        return self.name == THINKING or self.name.removeprefix("message.") in REASONING_KEYS


def fields_of(messages: Sequence[Message]) -> list[Field]:
    """Returns the parts of all messages, in the order in which templates write them."""
    called = _called_names(messages)
    return [
        Field(f"messages[{i}]", name, texts, i)
        for i, message in enumerate(messages)
        for name, texts in _parts_of(message)
        if not (name == "message.name" and _names_a_call(message, called))
    ]


def unread_keys(messages: Sequence[Message], template: str) -> list[str]:
    """Returns the keys of messages that the template does not name, as `data.ignore` does."""
    called = _called_names(messages)
    keys = dict.fromkeys(
        key
        for message in messages
        for key, value in message.items()
        if key not in ("role", "content", "tool_calls", "tool_call_id")
        and value not in ("", [], {})
        and not (key == "name" and _names_a_call(message, called))
    )
    reads_thinking = any(_is_named(key, template) for key in REASONING_KEYS)

    def read(key):
        return _is_named(key, template) or (key in REASONING_KEYS and reads_thinking)

    return [f"message.{key}" if is_word(key) else "message.…" for key in keys if not read(key)]


def fields_of_tools(tools: Sequence[Mapping[str, Any]]) -> list[Field]:
    """Returns the texts, names and numbers in the schemas of tools.

    Not the values of `type`, `required` and ``$ref``, which templates may paraphrase.
    """
    return [
        Field(f"tools[{i}]", _of_tools(key), (text,))
        for i, tool in enumerate(tools)
        for key, text in _schema_texts(tool, "")
    ]


def unread_tool_keys(tools: Sequence[Mapping[str, Any]], template: str, text: str) -> list[str]:
    """Returns the keys of tools' schemas that a rendering does not express, as in `data.ignore`.

    A template expresses a key by writing it, or by reading it and putting it in other words.
    """
    keys = dict.fromkeys(key for tool in tools for key in _schema_keys(tool))

    def written(key):
        return f'"{key}"' in text or f"'{key}'" in text

    unread = (key for key in keys if not written(key) and not _is_named(key, template))
    return list(dict.fromkeys(map(_of_tools, unread)))


def _called_names(messages: Sequence[Message]) -> set[str]:
    calls = (call for message in messages for call in message.get("tool_calls") or ())
    return {call.get("function", call)["name"] for call in calls}


def _names_a_call(message: Message, called: Set[str]) -> bool:
    """Says whether the name of a tool's result identifies its call, as tool_call_id does."""
    return message["role"] == "tool" and message.get("name") in called


def _is_named(key: str, template: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(key)}(?!\w)", template) is not None


def _of_tools(key: str) -> str:
    return f"tools.{key}" if is_word(key.removeprefix("$")) else "tools.…"


def _parts_of(message: Message) -> Iterator[tuple[str, tuple[str, ...]]]:
    role = message["role"]
    content = message.get("content") or ""
    for key in REASONING_KEYS:
        if words := tuple(_texts_in(message.get(key))):
            yield f"message.{key}", words
    if role == "assistant":
        position = 0
        for match in _THINKING_TAGS.finditer(content):
            yield from _words("assistant.content", content[position : match.start()])
            yield from _words(THINKING, match[1])
            position = match.end()
        yield from _words("assistant.content", content[position:])
    else:
        yield from _words(f"{role}.content", content)
    if words := tuple(_texts_of_calls(message.get("tool_calls") or ())):
        yield f"{role}.tool_calls", words
    for key, value in message.items():
        if key not in _STRUCTURE and (words := tuple(_data_in(value, names=False))):
            yield f"message.{key}", words


def _words(name: str, content: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    if words := content.strip():
        yield name, (words,)


def _texts_of_calls(calls: Iterable[Any]) -> Iterator[str]:
    for call in calls:
        inner = call.get("function", call)
        yield inner["name"]
        arguments = inner.get("arguments")
        if isinstance(arguments, str):  # as a template asked for them: told apart when parsed
            arguments = json.loads(arguments)
        yield from _data_in(arguments or {})
        for holder in [inner] if inner is call else [inner, call]:
            yield from _data_in({k: v for k, v in holder.items() if k not in _CALL_STRUCTURE})


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


def _data_in(value: Any, *, names: bool = True) -> Iterator[str]:
    """Yields every text, number and name in a JSON value, but no truth values."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _texts_in(name if names else None)
            yield from _data_in(item, names=names)
    elif isinstance(value, list):
        for item in value:
            yield from _data_in(item, names=names)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)
    else:
        yield from _texts_in(value)


def _schema_texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yields the texts, names and numbers in a schema, each with its key."""
    if isinstance(value, dict):
        for inner, item in value.items():
            if item is None:
                continue
            if key in _NAMING:
                yield key, inner
            if key in _NAMING or inner not in _REWORDED or isinstance(item, dict):
                yield from _schema_texts(item, "" if key in _NAMING else inner)
    elif isinstance(value, list):
        for item in value:
            yield from _schema_texts(item, key)
    else:
        yield from ((key, text) for text in _data_in(value))


def _schema_keys(value: Any, key: str = "") -> Iterator[str]:
    """Yields the keys of a schema that hold something, except names from the row."""
    if isinstance(value, dict):
        for inner, item in value.items():
            if item is None or item in ("", [], {}):
                continue
            if key not in _NAMING:
                yield inner
            yield from _schema_keys(item, "" if key in _NAMING else inner)
    elif isinstance(value, list):
        for item in value:
            yield from _schema_keys(item, key)
