"""The columns of a row: those that a format needs, those that are read, and the unread ones."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from lorax.data.reading.rows import (
    DataError,
    MalformedRowError,
    Row,
    RowError,
    describe,
    is_word,
)

FORMAT_COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "tokenized": ("input_ids",),
}
"""Columns that each format needs."""

CHAT_COLUMNS = ("tools", "chat_template_kwargs")
"""Columns that are for a chat template."""

_OPTIONAL_COLUMNS: dict[str, tuple[str, ...]] = {
    "messages": ("system", *CHAT_COLUMNS),
    "sharegpt": ("system", *CHAT_COLUMNS),
    "alpaca": ("input", "system", "history"),
    "prompt_completion": CHAT_COLUMNS,
    "text": (),
    "tokenized": ("labels", "attention_mask"),
}

FLAGS = (
    "train",
    "training",
    "trainable",
    "train_on_turn",
    "weight",
    "loss",
    "loss_mask",
    "mask",
)
"""Keys that decide whether a turn or a row is learned: yes with 1 or true, no with 0 or false."""

_LONGEST_NAME = 60

_FLAG_VALUES = {"0": False, "false": False, "1": True, "true": True}

_REMEDIES = {
    "functions": "write the functions as tools",
    "function_call": "write the call as tool_calls of a message",
    **dict.fromkeys(("images", "videos", "audios"), "lorax learns from text alone"),
}


def fitting_formats(columns: Collection[str]) -> list[str]:
    """Returns the formats of which all columns are present."""
    return [
        name for name, needed in FORMAT_COLUMNS.items() if all(key in columns for key in needed)
    ]


def detect_format(columns: Collection[str]) -> str:
    """Returns the one format of which all columns are present.

    Raises:
        DataError: If no format fits or several do; lists the columns found and the formats.
    """
    fitting = fitting_formats(columns)
    if len(fitting) == 1:
        return fitting[0]
    accepted = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in FORMAT_COLUMNS.items())
    # Without a header the first row of a table names its columns: they may be training text.
    words = sorted(key for key in columns if is_word(key))
    others = f" and {len(columns) - len(words)} that are no words" * (len(words) < len(columns))
    found = f"the columns {words}{others}"
    problem = (
        f"{found} fit several formats ({', '.join(fitting)}); set data.format"
        if fitting
        else f"{found} fit no format; rename them"
    )
    raise DataError(f"{problem}. Formats and the columns they need: {accepted}")


def check_columns(row: Row, data_format: str) -> None:
    """Refuses a row that lacks a column of its format.

    Raises:
        MalformedRowError: Naming the columns that are missing.
    """
    missing = [key for key in FORMAT_COLUMNS[data_format] if row.get(key) is None]
    if missing:
        words = (key if is_word(key) else describe(key) for key in row)
        names = (
            word + " (null)" * (row[key] is None) for word, key in zip(words, row, strict=True)
        )
        raise MalformedRowError(
            f"a row of format {data_format!r} needs the columns {', '.join(missing)}, got "
            f"{', '.join(names) or 'nothing'}; all rows of a source must have one format"
        )


def refuse_unread(row: Row, data_format: str) -> None:
    """Refuses a row that has the columns of its format, and others that nothing reads.

    Raises:
        RowError: Naming the columns that are not read, and the setting that allows them.
    """
    if any(row.get(key) is None for key in FORMAT_COLUMNS[data_format]):
        return  # it may be of another format, which reads them
    known = (*FORMAT_COLUMNS[data_format], *_OPTIONAL_COLUMNS[data_format], *FLAGS)
    if data_format == "prompt_completion" and isinstance(row["prompt"], str):
        known = tuple(key for key in known if key not in CHAT_COLUMNS)
    keys = [key for key, value in row.items() if key not in known and not is_empty(value)]
    if not keys:
        return
    hints = [f"{key}: {_REMEDIES[key]}" for key in keys if key in _REMEDIES]
    # Where a format's columns are present, the other columns have names too, not words of the data.
    names = ", ".join(repr(key) if _is_name(key) else describe(key) for key in keys)
    allowed = ", ".join(_in_a_list(key) if _is_name(key) else "…" for key in keys)
    raise RowError(
        f"nothing reads the columns {names} of a row: remove them, or allow them by name with "
        f"data.ignore: [{allowed}]" + "".join(f"; {hint}" for hint in hints)
    )


def _is_name(column: str) -> bool:
    return len(column) <= _LONGEST_NAME and column.isprintable()


def _in_a_list(name: str) -> str:
    """Returns a name quoted for a list in YAML or on a command line."""
    return name if is_word(name) else json.dumps(name, ensure_ascii=False)


def read_flag(holder: Mapping[str, Any], where: str) -> bool | None:
    """Returns the flag of a turn or a row that decides whether it is learned; None without one.

    Args:
        holder: A message, or a row.
        where: How messages name its keys, such as ``messages[0].``.

    Raises:
        MalformedRowError: If a flag is neither 0 or false nor 1 or true, or two differ.
    """
    found = {key: holder[key] for key in FLAGS if not is_empty(holder.get(key))}
    values = set()
    for key, value in found.items():
        # A table of text holds "0" and "true".
        word = str(int(value) if isinstance(value, float) and value in (0, 1) else value).lower()
        if isinstance(value, list | dict) or word not in _FLAG_VALUES:
            raise MalformedRowError(
                f"{where}{key} must be 0, 1, true or false (whether it is learned), got "
                f"{describe(value)}"
            )
        values.add(_FLAG_VALUES[word])
    if len(values) > 1:
        raise MalformedRowError(f"{where}{' and '.join(found)} contradict each other; keep one")
    return values.pop() if values else None


def is_empty(value: Any) -> bool:
    """Says whether a value holds no content."""
    return value is None or (isinstance(value, str | list | dict) and not value)
