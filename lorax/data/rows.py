"""Rows of one source, read one at a time, each with the place it stands in."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
from jaxtyping import Int64

type Row = dict[str, Any]

_ROWS_PER_READ = 1024


class DataError(ValueError):
    """A file, a row or a data setting that cannot be trained on."""


class Rows(Protocol):
    """What every source offers: its rows in order, and where each one stands."""

    name: str

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Row]: ...

    def place(self, index: int) -> str:
        """Returns where row `index` of this source stands, for messages."""
        ...


class LineRows:
    """JSON objects, one per line; blank lines are no rows.

    The lines are parsed here and not by `datasets`, whose JSON reader turns a column of text that
    looks like dates into timestamps and fills keys a row does not have.

    Args:
        name: The file, as the user wrote it.
        lines: A table with one column, `text`, one row per line of the file.
        numbers: Which lines are rows, counted from 0.
    """

    def __init__(
        self, name: str, lines: datasets.Dataset, numbers: Int64[np.ndarray, " rows"]
    ) -> None:
        self.name = name
        self._lines = lines
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), _ROWS_PER_READ):
            numbers = self._numbers[start : start + _ROWS_PER_READ]
            texts = self._lines[numbers.tolist()]["text"]
            for number, text in zip(numbers, texts, strict=True):
                yield parse_object(text, f"{self.name}:{number + 1}")

    def place(self, index: int) -> str:
        """Returns ``file:line``, lines counted from 1 and blank ones included."""
        return f"{self.name}:{self._numbers[index] + 1}"


class TableRows:
    """Rows of a table: parquet, CSV, a hub dataset or a JSON array.

    Args:
        name: The file or hub id, as the user wrote it.
        table: All rows.
        numbers: Which of them are read, counted from 0.
    """

    def __init__(
        self,
        name: str,
        table: datasets.Dataset | Sequence[Row],
        numbers: Int64[np.ndarray, " rows"],
    ) -> None:
        self.name = name
        self._table = table
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Row]:
        if isinstance(self._table, datasets.Dataset):
            # Arrow gives every struct of a column all the keys that any of them has.
            yield from map(_without_none, self._table.select(self._numbers))
        else:
            for number in self._numbers:
                yield check_object(self._table[number], f"{self.name}: row {number}")

    def place(self, index: int) -> str:
        """Returns ``file: row i``, counted from 0 in the whole file."""
        return f"{self.name}: row {self._numbers[index]} (counted from 0)"


def line_numbers(lines: datasets.Dataset) -> Int64[np.ndarray, " rows"]:
    """Returns the numbers, from 0, of the lines that are not blank."""
    found: list[int] = []
    first = 0
    for batch in lines.iter(batch_size=_ROWS_PER_READ):
        texts: list[str] = batch["text"]  # pyright: ignore[reportArgumentType, reportCallIssue]
        found += [first + index for index, text in enumerate(texts) if text.strip()]
        first += len(texts)
    return np.asarray(found, np.int64)


def parse_object(text: str, place: str) -> Row:
    """Returns the JSON object in `text`; raises DataError naming `place` if there is none."""
    try:
        value = json.loads(text, object_pairs_hook=_refuse_duplicate_keys)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: invalid JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: invalid JSON: {error}") from error
    return check_object(value, place)


def parse_array(path: Path, name: str) -> list[Row]:
    """Returns the elements of the JSON array in a file; raises DataError naming file and line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{undecodable_place(path, name)}: invalid UTF-8") from error
    try:
        return json.loads(text, object_pairs_hook=_refuse_duplicate_keys)
    except json.JSONDecodeError as error:
        where = f"{name}:{error.lineno}"
        raise DataError(f"{where}: invalid JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: invalid JSON: {error}") from error


def check_object(value: Any, place: str) -> Row:
    """Returns `value` if it is a JSON object; raises DataError naming `place` otherwise."""
    if not isinstance(value, dict):
        raise DataError(f"{place}: a row must be a JSON object, got {type(value).__name__}")
    return value


def undecodable_place(path: Path, name: str) -> str:
    """Returns ``file:line`` of the first line that is not UTF-8, or the file if all are."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return f"{name}:{number}"
    return name


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {repeated!r} stands twice in one object")
    return row


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) if isinstance(item, dict | list) else item for item in value]
    return value
