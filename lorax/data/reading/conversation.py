"""Conversations: messages as they are read, and the learned ones among them."""

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from lorax.data.reading.columns import FLAGS, is_empty, read_flag
from lorax.data.reading.rows import (
    MalformedRowError,
    Row,
    check_unicode,
    describe,
    refuse_duplicate_keys,
    show_name,
)

ROLES = ("system", "developer", "user", "assistant", "tool")
INSTRUCTING = ("system", "developer")
"""Roles of messages that come before a conversation and can be left out of it."""

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}

_NEEDED = ("role", "from", "content", "value")
"""Keys that are checked even where they are empty."""

type Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages that a chat template renders as text.

    Attributes:
        messages: Each with a role of `ROLES` and, except for tool calls, a text as content.
        tools: JSON schemas of the tools offered.
        template_kwargs: Further variables of the row for the chat template.
        completion_start: Index of the first message of the completion, if the row has one.
        flags: The flags of messages that decide whether they are learned, by index.
        turns: The messages that are learned, where that is decided; else the settings decide.
        elsewhere: Replies that are learned too, each in a row of its own.
    """

    messages: tuple[Message, ...]
    tools: list[Any] | None = None
    template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    completion_start: int | None = None
    flags: Mapping[int, bool] = dataclasses.field(default_factory=dict)
    turns: tuple[int, ...] | None = None
    elsewhere: tuple[int, ...] = ()

    @property
    def replies(self) -> tuple[int, ...]:
        """Indices of all assistant messages."""
        return tuple(i for i, item in enumerate(self.messages) if item["role"] == "assistant")

    @property
    def has_leading_answer(self) -> bool:
        """Whether an assistant turn comes before the first user turn."""
        for message in self.messages:
            if message["role"] in ("user", "assistant"):
                return message["role"] == "assistant"
        return False

    def learned_replies(self, loss_on: str) -> tuple[int, ...]:
        """Returns the indices of the messages that are learned under `data.loss_on`."""
        if self.turns is not None:
            return self.turns
        if self.completion_start is not None:
            asked = tuple(i for i in self.replies if i >= self.completion_start)
        else:
            asked = self.replies if loss_on == "assistant" else self.replies[-1:]
        return tuple(i for i in asked if self.flags.get(i, True))

    def without_leading_answer(self) -> "Conversation":
        """Returns the conversation from its first user turn on, with its system messages.

        Raises:
            MalformedRowError: If nothing is left to learn.
        """
        roles = [message["role"] for message in self.messages]
        first = roles.index("user") if "user" in roles else len(roles)
        shorter = self._of([i for i, role in enumerate(roles) if i >= first or role in INSTRUCTING])
        refuse_no_answer(shorter.messages)
        return shorter

    def without_roles(self, roles: Collection[str]) -> "Conversation":
        """Returns the conversation without the messages of some roles."""
        kept = [i for i, message in enumerate(self.messages) if message["role"] not in roles]
        return self if len(kept) == len(self.messages) else self._of(kept)

    def _of(self, kept: Sequence[int]) -> "Conversation":
        """Returns the conversation of some of the messages."""
        start = self.completion_start
        return dataclasses.replace(
            self,
            messages=tuple(self.messages[i] for i in kept),
            completion_start=None if start is None else sum(i < start for i in kept),
            flags={new: self.flags[i] for new, i in enumerate(kept) if i in self.flags},
        )

    def apart(self, loss_on: str) -> list["Conversation"]:
        """Returns a conversation per learned turn: the messages up to it, with it alone learned."""
        learned = self.learned_replies(loss_on)
        return [
            dataclasses.replace(
                self,
                messages=self.messages[: turn + 1],
                turns=(turn,),
                elsewhere=tuple(other for other in learned if other != turn),
            )
            for turn in learned
        ]

    @property
    def has_calls(self) -> bool:
        """Whether a message calls a function."""
        return any(message.get("tool_calls") for message in self.messages)

    def with_arguments_as_text(self) -> "Conversation":
        """Returns the conversation with the arguments of all calls as JSON text."""
        return dataclasses.replace(self, messages=tuple(map(_with_text, self.messages)))

    def with_empty_content(self, empty: Literal["", None]) -> "Conversation":
        """Returns the conversation with `empty` as the content of calls that have no words."""
        messages = tuple(
            message | {"content": empty}
            if message.get("tool_calls") and not message.get("content")
            else message
            for message in self.messages
        )
        return dataclasses.replace(self, messages=messages)


def read_messages(row: Row, column: str) -> tuple[list[Message], dict[int, bool]]:
    """Reads a column of messages: the messages for the template, and their flags by index.

    Raises:
        MalformedRowError: Naming the message and the key, what came and what was needed.
    """
    messages = []
    flags = {}
    for index, (item, where) in enumerate(list_of_dicts(row, column)):
        flag = read_flag(item, f"{where}.")
        if flag is not None:
            flags[index] = flag
        # Templates test whether a key exists, and a table has all keys in all messages.
        kept = {
            key: value
            for key, value in item.items()
            if key not in FLAGS and (key in _NEEDED or not is_empty(value)) and value is not None
        }
        read = _read_sharegpt if column == "conversations" else _read_message
        messages.append(read(kept, where))
    return messages, flags


def _read_message(message: Message, where: str, said: str = "content") -> Message:
    """Reads a message of the form that templates take; `said` is the row's key of the content."""
    role = message.get("role")
    if role not in ROLES:
        raise MalformedRowError(
            f"{where}.role must be one of {', '.join(ROLES)}, got {show_name(role)}"
        )
    if "tool_calls" in message:
        message = message | {"tool_calls": _read_calls(message["tool_calls"], where)}
    if "content" not in message and not message.get("tool_calls"):
        raise MalformedRowError(f"{where}.{said} is missing or null; needed is text")
    if "content" in message:
        message = message | {"content": _joined_parts(message["content"], f"{where}.{said}")}
    content = text_of(message.get("content", ""), f"{where}.{said}", empty=True)
    if role == "assistant" and not content.strip() and not message.get("tool_calls"):
        raise MalformedRowError(f"{where}.{said} is empty, and it is the assistant's answer")
    return message


def _read_sharegpt(turn: Message, where: str) -> Message:
    known = (*_SHAREGPT_ROLES, *ROLES)
    role = turn.get("from")
    if role not in known:
        raise MalformedRowError(
            f"{where}.from must be one of {', '.join(known)}, got {show_name(role)}"
        )
    message = {key: value for key, value in turn.items() if key not in ("from", "value")}
    message |= {"role": _SHAREGPT_ROLES.get(role, role)}
    own = turn.get("role")
    if not is_empty(own) and own not in (role, message["role"]):
        raise MalformedRowError(f"{where}.from and {where}.role contradict each other; keep one")
    value = turn.get("value")
    content = turn.get("content")
    if not is_empty(value) and not is_empty(content) and value != content:
        raise MalformedRowError(
            f"{where}.value and {where}.content contradict each other; keep one"
        )
    if "value" in turn and (is_empty(content) or not is_empty(value)):
        message["content"] = value
    return _read_message(message, where, "value")


def _read_calls(calls: Any, where: str) -> list[Any]:
    """Returns a message's tool calls; arguments that are JSON text are parsed."""
    if not isinstance(calls, list):
        raise MalformedRowError(
            f"{where}.tool_calls must be a list of objects, got {describe(calls)}"
        )
    return [_read_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]


def _read_call(call: Any, where: str) -> Mapping[str, Any]:
    function_name(call, where)
    inner = call.get("function", call)
    arguments = {}
    if not is_empty(inner.get("arguments")):  # else it has none
        place = f"{where}.{'function.' * ('function' in call)}"
        arguments = _parse_arguments(inner["arguments"], place)
    inner = {**inner, "arguments": arguments}
    return {**call, "function": inner} if "function" in call else inner


def _parse_arguments(value: Any, where: str) -> dict[str, Any]:
    needed = f"{where}arguments must be a JSON object, or text that is one"
    value = parsed(value, needed)
    if not isinstance(value, dict):
        raise MalformedRowError(f"{needed}, got {describe(value)}")
    return value


def parsed(value: Any, needed: str) -> Any:
    """Parses a value that is JSON text, as in tables that cannot hold objects of any shape.

    Raises:
        MalformedRowError: Naming what is `needed`, if it is text and no JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, object_pairs_hook=refuse_duplicate_keys)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "cannot be parsed"
        raise MalformedRowError(f"{needed}, got text that is no JSON: {reason}") from error


def _with_text(message: Message) -> Message:
    def as_text(call: Mapping[str, Any]) -> Mapping[str, Any]:
        inner = call.get("function", call)
        if not isinstance(inner.get("arguments"), dict):
            return call
        inner = {**inner, "arguments": json.dumps(inner["arguments"], ensure_ascii=False)}
        return {**call, "function": inner} if "function" in call else inner

    if not message.get("tool_calls"):
        return message
    return message | {"tool_calls": [as_text(call) for call in message["tool_calls"]]}


def function_name(value: Any, where: str) -> str:
    """Returns the name in a tool or a call, which may be in an object of its own."""
    inner = value.get("function", value) if isinstance(value, Mapping) else None
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if not isinstance(name, str) or not name:
        raise MalformedRowError(f"{where} needs a function's name, got {describe(value)}")
    return name


def refuse_no_answer(messages: Sequence[Message]) -> None:
    """Refuses messages without anything to learn."""
    if not any(message["role"] == "assistant" for message in messages):
        raise MalformedRowError(
            "the conversation has no assistant turn to learn from, only "
            + (", ".join(message["role"] for message in messages[:6]) or "nothing")
            + ", …" * (len(messages) > 6)
        )


def list_of_dicts(row: Row, column: str) -> list[tuple[Mapping[str, Any], str]]:
    """Returns each object of a column with the name it has in messages."""
    value = row[column]
    if not isinstance(value, list) or not value:
        raise MalformedRowError(f"{column} must be a list of objects, got {describe(value)}")
    for index, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise MalformedRowError(f"{column}[{index}] must be an object, got {describe(item)}")
    return [(item, f"{column}[{index}]") for index, item in enumerate(value)]


def text_of(value: Any, where: str, *, empty: bool = False) -> str:
    """Returns `value` if it is text; raises MalformedRowError naming `where` otherwise."""
    if not isinstance(value, str):
        raise MalformedRowError(f"{where} must be text, got {describe(value)}")
    if not value.strip() and not empty:
        raise MalformedRowError(f"{where} is empty")
    return check_unicode(value, where)


def _joined_parts(content: Any, where: str) -> Any:
    """Returns the text of a list of text parts, ``{"type": "text", "text": …}``; else `content`.

    Raises:
        MalformedRowError: If a part is of another type, which is named.
    """
    if not isinstance(content, list) or not content:
        return content
    for index, part in enumerate(content):
        if not isinstance(part, Mapping) or "type" not in part:
            return content
        if part["type"] != "text":
            raise MalformedRowError(
                f"{where}[{index}].type must be 'text', got {show_name(part['type'])}: lorax "
                "learns from text alone"
            )
        if unread := [key for key in part if key not in ("type", "text") and part[key] is not None]:
            raise MalformedRowError(
                f"{where}[{index}] has keys that nothing reads: {', '.join(map(show_name, unread))}"
            )
    if not all(isinstance(part.get("text"), str) for part in content):
        return content
    return "".join(part["text"] for part in content)
