"""The formats of rows, and the examples that they are read as."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from lorax.data.reading.columns import check_columns, is_empty
from lorax.data.reading.conversation import (
    Conversation,
    Message,
    function_name,
    list_of_dicts,
    parsed,
    read_messages,
    refuse_no_answer,
    text_of,
)
from lorax.data.reading.rows import MalformedRowError, Row, describe

IGNORED_LABEL = -100

type RowKind = Literal["chat", "alpaca", "text", "tokens"]
"""Kinds of rows: rendered by a chat template or lorax's Alpaca prompt, plain text, or token ids."""

ROW_KINDS: tuple[RowKind, ...] = ("chat", "alpaca", "text", "tokens")
"""All kinds; the first one present decides how a prompt is treated."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """Plain text whose second part is learned."""

    prompt: str
    completion: str
    kind: RowKind = "text"


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


def kind_of(example: Example) -> RowKind:
    """Returns the kind of an example's row."""
    match example:
        case Conversation():
            return "chat"
        case Completion():
            return example.kind
        case Document():
            return "text"
    return "tokens"


def read_example(row: Row, data_format: str, *, chat: bool) -> Example:
    """Reads a row of the format `data_format`.

    Args:
        row: Column to value.
        data_format: A key of `FORMAT_COLUMNS`.
        chat: Whether there is a chat template; without one an alpaca row becomes plain text.

    Raises:
        MalformedRowError: Naming the column or message, what came and what was needed.
    """
    check_columns(row, data_format)
    match data_format:
        case "messages" | "sharegpt":
            column = "messages" if data_format == "messages" else "conversations"
            return _read_conversation(row, *read_messages(row, column))
        case "alpaca":
            return _read_alpaca(row, chat=chat)
        case "prompt_completion":
            return _read_prompt_completion(row)
        case "text":
            return Document(text_of(row["text"], "text"))
    return _read_tokens(row)


def _read_conversation(row: Row, messages: list[Message], flags: dict[int, bool]) -> Conversation:
    """Adds the columns `system` and `tools`, if present, to the messages."""
    system = _optional_text(row, "system")
    if system and messages[0]["role"] == "system":
        raise MalformedRowError(
            "the row has a system column and a system message; keep one of them"
        )
    if system:
        messages = [{"role": "system", "content": system}, *messages]
        flags = {index + 1: flag for index, flag in flags.items()}
    refuse_no_answer(messages)
    return Conversation(tuple(messages), _read_tools(row), _read_kwargs(row), flags=flags)


def _optional_text(row: Row, column: str) -> str:
    """Returns the text of an optional column; an empty one counts as absent."""
    value = row.get(column)
    return "" if is_empty(value) else text_of(value, column, empty=True)


def _read_tools(row: Row) -> list[Any] | None:
    if is_empty(row.get("tools")):
        return None
    needed = "must be a list of objects, or JSON text that is one"
    value = parsed(row["tools"], f"tools {needed}")
    if isinstance(value, list):
        value = [parsed(tool, f"tools[{i}] {needed}") for i, tool in enumerate(value)]
    if is_empty(value):
        return None
    tools = list_of_dicts({"tools": value}, "tools")
    for tool, where in tools:
        function_name(tool, where)
    return [dict(tool) for tool, _ in tools]


def _read_kwargs(row: Row) -> Mapping[str, Any]:
    value = row.get("chat_template_kwargs")
    if is_empty(value):
        return {}
    if not isinstance(value, dict):
        raise MalformedRowError(f"chat_template_kwargs must be an object, got {describe(value)}")
    return value


def _read_alpaca(row: Row, *, chat: bool) -> Example:
    if not is_empty(row.get("history")):
        raise MalformedRowError("the column history is not read; write such rows as messages")
    instruction = text_of(row["instruction"], "instruction")
    output = text_of(row["output"], "output")
    extra = _optional_text(row, "input")
    system = _optional_text(row, "system")
    if not chat:
        return Completion(alpaca_prompt(instruction, extra, system), output, kind="alpaca")
    user = f"{instruction}\n\n{extra}" if extra else instruction
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": output}]
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    return Conversation(tuple(messages), completion_start=len(messages) - 1)


def alpaca_prompt(instruction: str, extra: str = "", system: str = "") -> str:
    """Returns the text before the answer to an instruction, where there is no chat template.

    Args:
        instruction: The instruction.
        extra: Its input, if any.
        system: The first text, in the place of lorax's own sentence.
    """
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
    prompt = row["prompt"]
    completion = row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        opening, flags = read_messages(row, "prompt")
        answer, more = read_messages(row, "completion")
        if not any(message["role"] == "assistant" for message in answer):
            raise MalformedRowError("completion has no assistant turn to learn from")
        return Conversation(
            (*opening, *answer),
            _read_tools(row),
            _read_kwargs(row),
            completion_start=len(opening),
            flags=flags | {index + len(opening): flag for index, flag in more.items()},
        )
    if isinstance(prompt, list) or isinstance(completion, list):
        raise MalformedRowError(
            "prompt and completion must both be text or both be lists of messages, got "
            f"{describe(prompt)} and {describe(completion)}"
        )
    return Completion(text_of(prompt, "prompt", empty=True), text_of(completion, "completion"))


def _read_tokens(row: Row) -> TokenRow:
    tokens = _integers(row["input_ids"], "input_ids")
    mask = row.get("attention_mask")
    if mask is not None and not (isinstance(mask, list) and {type(i) for i in mask} <= {int, bool}):
        raise MalformedRowError(f"attention_mask must be a list of 0 and 1, got {describe(mask)}")
    if mask is not None and not all(mask):
        raise MalformedRowError("attention_mask holds zeros: store the rows without their padding")
    if row.get("labels") is None:
        return TokenRow(tokens, None)
    labels = _integers(row["labels"], "labels")
    if len(labels) != len(tokens):
        raise MalformedRowError(f"labels has {len(labels)} entries and input_ids has {len(tokens)}")
    for index, (token, label) in enumerate(zip(tokens, labels, strict=True)):
        if label not in (IGNORED_LABEL, token):
            raise MalformedRowError(
                f"labels[{index}] is {label} and input_ids[{index}] is {token}: a label must be "
                f"the token of its own position (not the next one) or {IGNORED_LABEL}"
            )
    return TokenRow(tokens, labels)


def _integers(value: Any, where: str) -> list[int]:
    if not isinstance(value, list) or not value:
        raise MalformedRowError(f"{where} must be a list of token ids, got {describe(value)}")
    for index, item in enumerate(value):
        if type(item) is not int:
            raise MalformedRowError(f"{where}[{index}] must be an integer, got {describe(item)}")
    return value
