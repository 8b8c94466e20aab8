"""Settings of the data: sources, rendering and loss mask."""

import datetime
from collections.abc import Iterator
from typing import Annotated, Any, Literal, override

from pydantic import AfterValidator, BeforeValidator, Field

from lorax.config.marks import Free, OfRun
from lorax.config.types import Conflict, FromList, Section, Text


def _text_of_date(value: Any) -> Any:
    # YAML reads 2026-11-30 as a date.
    return value.isoformat() if type(value) is datetime.date else value


def _check_date(text: str) -> str:
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise ValueError(f"needs a date as 2026-11-30, got {text!r}") from error


Date = Annotated[str, AfterValidator(_check_date), BeforeValidator(_text_of_date)]


class DataSource(Section):
    """One file or hub dataset.

    Attributes:
        path: A .jsonl, .json, .parquet or .csv file, or a hub id.
        name: Configuration of the hub dataset.
        split: Split of the hub dataset.
        field: For a .json file with one object: the key of its list of rows.
    """

    path: Text
    name: Text | None = None
    split: Text = "train"
    field: Text | None = None


def _sources_from_paths(value: Any) -> Any:
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list | tuple):
        return value
    return tuple({"path": entry} if isinstance(entry, str) else entry for entry in entries)


Sources = Annotated[tuple[DataSource, ...], BeforeValidator(_sources_from_paths)]


class DataConfig(Section):
    r"""The data, and the tokens of it that are learned.

    Attributes:
        train: Sources of the training rows; a path alone stands for ``[{path: …}]``.
        eval: Sources of the held-out rows.
        format: Format of the rows; `auto` finds it by their columns.
        chat_template: `tokenizer`, or the path of a .jinja file.
        date: Today's date for a chat template that asks for it, as ``2026-11-30``; null is the day
            on which the run begins. A run keeps its date.
        ignore: Parts of a row that need not be learned from, by the names in the errors: a column,
            such as ``id``; a key of messages or tools, ``message.name`` or ``tools.strict``; a text
            that the chat template leaves out, ``developer.content``, ``assistant.thinking`` or
            ``tools.description``. Messages of system or developer are then left out whole, because
            some templates fail on them.
        loss_on: The tokens that are prediction targets.
        train_on_eos: Which end-of-turn tokens are targets.
        instruction_part: Text that opens a user turn, such as ``<|im_start|>user\n``.
        response_part: Text that opens an assistant turn. Both or neither.
        max_seq_length: Longest row in tokens.
        overlong: What happens to longer rows.
        malformed: What happens to rows that cannot be read, or hold no answer.
        leading_answer: What happens to conversations that begin with an assistant turn: `trim`
            removes the messages before the first user turn, `drop` the row; `error` refuses those
            in which the chat template does not show where that turn starts.
        unsupervised: What happens to rows whose loss mask is empty, as when their answer was cut
            off.
        packing: Puts several short rows into one, without attention between them.
        shuffle: A new order in each epoch, given by `train.seed`.
    """

    train: Annotated[Sources, Field(min_length=1), Free]
    eval: Annotated[Sources, Free] = ()
    format: Annotated[
        Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "tokenized"],
        OfRun,
    ] = "auto"
    chat_template: Annotated[Text, OfRun] = "tokenizer"
    date: Annotated[Date | None, Free] = None
    ignore: Annotated[tuple[Text, ...], FromList, OfRun] = ()
    loss_on: Annotated[Literal["assistant", "last_assistant", "completion", "all"], OfRun] = (
        "assistant"
    )
    train_on_eos: Annotated[Literal["turn", "last", "all", "none"], OfRun] = "turn"
    instruction_part: Annotated[Text | None, OfRun] = None
    response_part: Annotated[Text | None, OfRun] = None
    max_seq_length: Annotated[int, Field(ge=2), OfRun] = 2048
    overlong: Annotated[Literal["error", "truncate", "drop"], OfRun] = "error"
    malformed: Annotated[Literal["error", "drop"], OfRun] = "error"
    leading_answer: Annotated[Literal["error", "trim", "drop"], OfRun] = "error"
    unsupervised: Annotated[Literal["error", "drop"], OfRun] = "error"
    packing: Annotated[bool, OfRun] = False
    shuffle: Annotated[bool, OfRun] = True

    @override
    def conflicts(self) -> Iterator[Conflict]:
        if self.chat_template != "tokenizer" and not self.chat_template.endswith(".jinja"):
            needed = "needs `tokenizer` or the path of a .jinja file"
            yield "chat_template", f"{needed}, got {self.chat_template!r}"
        if (self.instruction_part is None) != (self.response_part is None):
            given = "response_part" if self.instruction_part is None else "instruction_part"
            yield given, "instruction_part and response_part go together: set both or neither"
