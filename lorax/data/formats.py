"""What a row may look like, and the example it is read as."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from lorax.data.rows import DataError, Row, check_unicode, describe, is_word, show_name

FORMAT_COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "tokenized": ("input_ids",),
}
"""Format to the columns it needs; those it may have besides stand at its reader."""

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_TRAIN_FLAGS = ("weight", "train", "training")
IGNORED_LABEL = -100

type Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages that a chat template turns into text.

    Attributes:
        messages: Each with a role of `ROLES` and, but for tool calls, a text as content.
        tools: JSON schemas of the tools offered.
        completion_start: Where the completion starts, if the row says so.
    """

    messages: tuple[Message, ...]
    tools: list[Any] | None = None
    completion_start: int | None = None

    @property
    def functions(self) -> set[str]:
        """Names of the functions that are offered or called."""
        offered = {_function_name(tool, "tools") for tool in self.tools or ()}
        return offered.union(*(_called_names(message, "messages") for message in self.messages))

    @property
    def replies(self) -> tuple[int, ...]:
        """Indices of all assistant messages."""
        return tuple(i for i, item in enumerate(self.messages) if item["role"] == "assistant")

    def learned_replies(self, loss_on: str) -> tuple[int, ...]:
        """Returns the indices of the messages that are learned under `data.loss_on`."""
        if self.completion_start is not None:
            return tuple(i for i in self.replies if i >= self.completion_start)
        return self.replies if loss_on == "assistant" else self.replies[-1:]


@dataclasses.dataclass(frozen=True)
class Completion:
    """Plain text of which the second part is learned."""

    prompt: str
    completion: str


@dataclasses.dataclass(frozen=True)
class Document:
    """Plain text that is learned whole."""

    text: str


@dataclasses.dataclass(frozen=True)
class TokenRow:
    """Token ids with, where given, one label each: the id itself or -100."""

    tokens: list[int]
    labels: list[int] | None


type Example = Conversation | Completion | Document | TokenRow


def detect_format(columns: Collection[str]) -> str:
    """Returns the one format whose columns are all there.

    Raises:
        DataError: If no format fits or several do; lists what was found and what is accepted.
    """
    fitting = [
        name for name, needed in FORMAT_COLUMNS.items() if all(key in columns for key in needed)
    ]
    if len(fitting) == 1:
        return fitting[0]
    accepted = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in FORMAT_COLUMNS.items())
    # Without a header the first row of a table stands for its columns: they may be training text.
    words = sorted(key for key in columns if is_word(key))
    others = f" and {len(columns) - len(words)} that are no words" * (len(words) < len(columns))
    found = f"the columns {words}{others}"
    problem = (
        f"{found} fit several formats ({', '.join(fitting)}); set data.format"
        if fitting
        else f"{found} fit no format; rename them"
    )
    raise DataError(f"{problem}. Formats and the columns they need: {accepted}")


def read_example(row: Row, data_format: str, *, chat: bool) -> Example:
    """Reads a row as `data_format` says.

    Args:
        row: Column to value.
        data_format: A key of `FORMAT_COLUMNS`.
        chat: Whether there is a chat template; without one an alpaca row becomes plain text.

    Raises:
        DataError: Naming the column or message, what came and what was needed.
    """
    missing = [key for key in FORMAT_COLUMNS[data_format] if row.get(key) is None]
    if missing:
        words = (key if is_word(key) else describe(key) for key in row)
        names = (
            word + " (null)" * (row[key] is None) for word, key in zip(words, row, strict=True)
        )
        found = ", ".join(names) or "nothing"
        raise DataError(
            f"a row of format {data_format!r} needs the columns {', '.join(missing)}, got {found}; "
            "all rows of a source must have one format"
        )
    match data_format:
        case "messages":
            messages = [_read_message(*item) for item in _list_of_dicts(row, "messages")]
            return _conversation(row, messages)
        case "sharegpt":
            messages = [_read_sharegpt(*item) for item in _list_of_dicts(row, "conversations")]
            return _conversation(row, messages)
        case "alpaca":
            return _read_alpaca(row, chat=chat)
        case "prompt_completion":
            return _read_prompt_completion(row)
        case "text":
            return Document(_text(row["text"], "text"))
    return _read_tokens(row)


def _read_message(message: Mapping[str, Any], where: str) -> Message:
    kept = {key: value for key, value in message.items() if value is not None}
    role = kept.get("role")
    if role not in ROLES:
        raise DataError(f"{where}.role must be one of {', '.join(ROLES)}, got {show_name(role)}")
    _refuse_train_flags(kept, where)
    _called_names(kept, where)
    if "content" not in kept and not kept.get("tool_calls"):
        raise DataError(f"{where}.content is missing or null; needed is text")
    content = _text(kept.get("content", ""), f"{where}.content", empty=True)
    if role == "assistant" and not content.strip() and not kept.get("tool_calls"):
        raise DataError(f"{where}.content is empty, and it is what the assistant should say")
    return kept


def _called_names(message: Mapping[str, Any], where: str) -> list[str]:
    """Returns the functions that a message calls."""
    calls = message.get("tool_calls")
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise DataError(f"{where}.tool_calls must be a list of objects, got {describe(calls)}")
    return [_function_name(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]


def _function_name(value: Any, where: str) -> str:
    """Returns the name in a tool or a call, which may stand in an object of its own."""
    inner = value.get("function", value) if isinstance(value, Mapping) else None
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if not isinstance(name, str) or not name:
        raise DataError(f"{where} needs a function's name, got {describe(value)}")
    return name


def _read_sharegpt(turn: Mapping[str, Any], where: str) -> Message:
    known = (*_SHAREGPT_ROLES, *ROLES)
    role = turn.get("from")
    if role not in known:
        raise DataError(f"{where}.from must be one of {', '.join(known)}, got {show_name(role)}")
    _refuse_train_flags(turn, where)
    content = _text(turn.get("value"), f"{where}.value", empty=True)
    message = {"role": _SHAREGPT_ROLES.get(role, role), "content": content}
    if message["role"] == "assistant" and not content.strip():
        raise DataError(f"{where}.value is empty, and it is what the assistant should say")
    return message


def _refuse_train_flags(message: Mapping[str, Any], where: str) -> None:
    for flag in _TRAIN_FLAGS:
        if message.get(flag) is not None and not message[flag]:
            raise DataError(
                f"{where}.{flag} is {message[flag]!r}: turns cannot be left out one by one; "
                "remove the key, or end the conversation earlier"
            )


def _conversation(row: Row, messages: list[Message]) -> Conversation:
    """Adds the columns `system` and `tools`, if there are any, to the messages."""
    system = _text(row.get("system") or "", "system", empty=True)
    if system and messages[0]["role"] == "system":
        raise DataError("the row has a system column and a system message; keep one of them")
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(
            "the conversation has no assistant turn to learn from, only "
            + ", ".join(message["role"] for message in messages)
        )
    return Conversation(tuple(messages), _read_tools(row))


def _read_tools(row: Row) -> list[Any] | None:
    if not row.get("tools"):
        return None
    tools = _list_of_dicts(row, "tools")
    for tool, where in tools:
        _function_name(tool, where)
    return [dict(tool) for tool, _ in tools]


def _read_alpaca(row: Row, *, chat: bool) -> Example:
    if row.get("history"):
        raise DataError("the column history is not read; write such rows as messages")
    instruction = _text(row["instruction"], "instruction")
    output = _text(row["output"], "output")
    extra = _text(row.get("input") or "", "input", empty=True)
    system = _text(row.get("system") or "", "system", empty=True)
    if not chat:
        return Completion(_alpaca_prompt(instruction, extra, system), output)
    user = f"{instruction}\n\n{extra}" if extra else instruction
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": output}]
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    return Conversation(tuple(messages), completion_start=len(messages) - 1)


def _alpaca_prompt(instruction: str, extra: str, system: str) -> str:
    opening = system or (
        "Read the instruction and the input that goes with it, then write a fitting response."
        if extra
        else "Read the instruction, then write a fitting response."
    )
    parts = [opening, f"### Instruction:\n{instruction}"]
    if extra:
        parts.append(f"### Input:\n{extra}")
    return "\n\n".join([*parts, "### Response:\n"])


def _read_prompt_completion(row: Row) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        opening = [_read_message(*item) for item in _list_of_dicts(row, "prompt")]
        answer = [_read_message(*item) for item in _list_of_dicts(row, "completion")]
        if not any(message["role"] == "assistant" for message in answer):
            raise DataError("completion has no assistant turn to learn from")
        return Conversation((*opening, *answer), _read_tools(row), completion_start=len(opening))
    if isinstance(prompt, list) or isinstance(completion, list):
        raise DataError(
            "prompt and completion must both be text or both be lists of messages, got "
            f"{describe(prompt)} and {describe(completion)}"
        )
    return Completion(_text(prompt, "prompt", empty=True), _text(completion, "completion"))


def _read_tokens(row: Row) -> TokenRow:
    tokens = _integers(row["input_ids"], "input_ids")
    mask = row.get("attention_mask")
    if mask is not None and not (isinstance(mask, list) and {type(i) for i in mask} <= {int, bool}):
        raise DataError(f"attention_mask must be a list of 0 and 1, got {describe(mask)}")
    if mask is not None and not all(mask):
        raise DataError("attention_mask holds zeros: store the rows without their padding")
    if row.get("labels") is None:
        return TokenRow(tokens, None)
    labels = _integers(row["labels"], "labels")
    if len(labels) != len(tokens):
        raise DataError(f"labels has {len(labels)} entries and input_ids has {len(tokens)}")
    for index, (token, label) in enumerate(zip(tokens, labels, strict=True)):
        if label not in (IGNORED_LABEL, token):
            raise DataError(
                f"labels[{index}] is {label} and input_ids[{index}] is {token}: a label must be "
                f"the token of its own position (not the next one) or {IGNORED_LABEL}"
            )
    return TokenRow(tokens, labels)


def _integers(value: Any, where: str) -> list[int]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where} must be a list of token ids, got {describe(value)}")
    for index, item in enumerate(value):
        if type(item) is not int:
            raise DataError(f"{where}[{index}] must be an integer, got {describe(item)}")
    return value


def _list_of_dicts(row: Row, column: str) -> list[tuple[Mapping[str, Any], str]]:
    """Returns each object of a column with the name it has in messages."""
    value = row[column]
    if not isinstance(value, list) or not value:
        raise DataError(f"{column} must be a list of objects, got {describe(value)}")
    for index, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise DataError(f"{column}[{index}] must be an object, got {describe(item)}")
    return [(item, f"{column}[{index}]") for index, item in enumerate(value)]


def _text(value: Any, where: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} must be text, got {describe(value)}")
    if not value.strip() and not empty:
        raise DataError(f"{where} is empty")
    return check_unicode(value, where)
