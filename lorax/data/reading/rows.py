"""Rows of one source, read one at a time, each with its place."""

import array
import datetime
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int64

from lorax.system.wording import kind_of

type Row = dict[str, Any]


class DataError(ValueError):
    """A file, a row or a data setting that cannot be trained on."""


class SourceError(DataError):
    """A file or a dataset of the hub that does not exist, or cannot be opened."""


class RowError(DataError):
    """A problem of one row, without its place; other rows may be right."""


class MalformedRowError(RowError):
    """A row that cannot be read, or that holds no answer: `data.malformed` decides."""


class Rows(Protocol):
    """The protocol of a source: its rows in order, and the place of each.

    A row that cannot be parsed comes as its error.
    """

    name: str

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Row | MalformedRowError]: ...

    def place(self, index: int) -> str:
        """Returns the place of row `index` of this source, for messages."""
        ...


class LineRows:
    """JSON objects, one per line; blank lines are no rows.

    The lines are parsed here and not by `datasets`, whose JSON reader turns a column of text that
    looks like dates into timestamps and fills keys a row does not have.

    Args:
        name: The file, as the user wrote it.
        path: The file.
        numbers: Which lines are rows, counted from 0.
        offsets: The bytes of the file before each of them.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        numbers: Int64[np.ndarray, " rows"],
        offsets: Int64[np.ndarray, " rows"],
    ) -> None:
        self.name = name
        self._path = path
        self._numbers = numbers
        self._offsets = offsets

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Row | MalformedRowError]:
        with self._path.open("rb") as file:
            for offset in self._offsets:
                if file.tell() != offset:
                    file.seek(offset)
                yield _row_or_error(parse_object, file.readline())

    def place(self, index: int) -> str:
        """Returns ``file:line``, lines counted from 1 and blank ones included."""
        return f"{self.name}:{self._numbers[index] + 1}"


class NumberedRows:
    """Rows with a number as their place: those of a JSON array, or of a table.

    Args:
        name: The file or hub id, as the user wrote it.
        table: All rows, by number.
        numbers: Which of them are read, counted from 0.
    """

    def __init__(
        self,
        name: str,
        table: Any,
        numbers: Int64[np.ndarray, " rows"],
    ) -> None:
        self.name = name
        self._table = table
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Row | MalformedRowError]:
        for number in self._numbers:
            yield _row_or_error(check_object, self._table[number])

    def place(self, index: int) -> str:
        """Returns ``file: row i``, counted from 0 in the whole file."""
        return f"{self.name}: row {self._numbers[index]} (counted from 0)"


def index_lines(
    path: Path,
) -> tuple[Int64[np.ndarray, " rows"], Int64[np.ndarray, " rows"]]:
    """Returns number, from 0, and offset of each line that is not blank; reads one at a time."""
    numbers = array.array("q")
    offsets = array.array("q")
    with path.open("rb") as file:
        offset = 3 if file.read(3) == b"\xef\xbb\xbf" else 0
        file.seek(offset)
        for number, line in enumerate(file):
            first = line.lstrip()[:1]
            # Only a line with another first byte is decoded, to see whether it is blank in Unicode.
            if b" " < first < b"\x7f" or line.decode(errors="replace").strip():
                numbers.append(number)
                offsets.append(offset)
            offset += len(line)
    return np.asarray(numbers, np.int64), np.asarray(offsets, np.int64)


def parse_object(line: bytes) -> Row:
    """Returns the JSON object in a line; raises MalformedRowError if there is none."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedRowError("invalid UTF-8") from error
    try:
        value = json.loads(text, object_pairs_hook=refuse_duplicate_keys)
    except json.JSONDecodeError as error:
        hint = "; the lines end in CR alone, which is no line end here" * ("\r" in text.strip())
        # The line break is part of the text: JSON that is cut off fails after it.
        column = min(error.pos, len(text.rstrip())) + 1
        raise MalformedRowError(f"invalid JSON: {error.msg} at column {column}{hint}") from error
    except (ValueError, RecursionError) as error:
        raise MalformedRowError(f"invalid JSON: {error}") from error
    return check_object(value)


def parse_document(path: Path, name: str) -> Any:
    """Returns the JSON value that a file holds; raises DataError naming file and line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{undecodable_place(path, name)}: invalid UTF-8") from error
    try:
        return json.loads(text, object_pairs_hook=refuse_duplicate_keys)
    except json.JSONDecodeError as error:
        where = f"{name}:{error.lineno}"
        raise DataError(f"{where}: invalid JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: invalid JSON: {error}") from error


def check_object(value: Any) -> Row:
    """Returns `value` if it is a JSON object; raises MalformedRowError otherwise."""
    if not isinstance(value, dict):
        raise MalformedRowError(f"a row must be a JSON object, got {kind_of(value)}")
    return value


def _row_or_error(read: Callable[[Any], Row], value: Any) -> Row | MalformedRowError:
    try:
        return read(value)
    except MalformedRowError as error:
        return error


def undecodable_place(path: Path, name: str) -> str:
    """Returns ``file:line`` of the first line that is not UTF-8, or the file if all are."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return f"{name}:{number}"
    return name


def check_unicode(value: str, where: str) -> str:
    """Returns `value`; raises MalformedRowError if Unicode cannot encode a character of it."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise MalformedRowError(
            f"{where} holds half a surrogate pair at character {error.start}, which is no Unicode "
            "text"
        ) from error
    return value


def is_word(value: Any) -> bool:
    """Says whether a name may be shown: a short identifier is no training text."""
    short = isinstance(value, str) and len(value) <= 20 and value.isascii()
    return short and value.replace("-", "_").isidentifier()


def show_name(value: Any) -> str:
    """Returns a role or a column's name if it may be shown, else its kind."""
    return repr(value) if is_word(value) else describe(value)


def describe(value: Any) -> str:
    """Describes a value by its kind, never by its words: they are training text."""
    match value:
        case datetime.date() | datetime.time():
            return (
                "a timestamp (the dataset's reader took text that looks like dates for dates; "
                "load the file itself, as .jsonl, and it stays text)"
            )
        case None:
            return "null"
        case str():
            return f"text of {len(value):,} characters"
        case bool() | int() | float():
            text = repr(value)
            # A long number may be personal.
            return f"{type(value).__name__} {text if len(text) <= 6 else f'of {len(text)} digits'}"
        case list():
            return f"a list of {len(value):,}" if value else "an empty list"
        case Mapping():
            return f"an object of {len(value)} keys"
    return f"a {type(value).__name__}"


def refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> Row:
    """Returns a JSON object's keys and values; raises ValueError if a key appears twice."""
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        shown = repr(repeated) if is_word(repeated) else f"of {len(repeated):,} characters"
        raise ValueError(f"key {shown} appears twice in one object")
    return row


def show_messages(indices: Sequence[int], most: int = 6) -> str:
    """Returns the words for messages of a row in an error: the first ones, and how many more."""
    more = len(indices) - most
    return ", ".join(f"messages[{i}]" for i in indices[:most]) + f" and {more} more" * (more > 0)
