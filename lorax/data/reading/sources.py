"""Files and hub datasets, opened as rows."""

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Int64

from lorax.config.data import DataConfig, DataSource
from lorax.data.reading.columns import fitting_formats
from lorax.data.reading.rows import (
    DataError,
    LineRows,
    NumberedRows,
    Rows,
    SourceError,
    check_object,
    describe,
    index_lines,
    is_word,
    parse_document,
    parse_object,
    show_name,
)
from lorax.system.small_files import special_kind
from lorax.system.wording import explain

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@contextlib.contextmanager
def open_source(source: DataSource) -> Iterator[Rows]:
    """Opens a file or a hub dataset for the length of a `with` block.

    A file is read every time. The cache of `datasets` for a table is a temporary directory that is
    removed afterwards, so a changed file is never served stale. Reading a file sends nothing.

    Args:
        source: The path ends in .jsonl, .json, .parquet or .csv, or is a hub id.

    Yields:
        At least one row.

    Raises:
        DataError: If there is no such file or dataset, or it is empty or broken; names the file
            and, if known, the line.
    """
    path = Path(source.path)
    if path.suffix.lower() in SUFFIXES:
        _check_file(path, source)
        if path.suffix.lower() in (".json", ".jsonl"):
            yield _open_json(path, source)
            return
        _refuse_field(source)
        with tempfile.TemporaryDirectory(prefix="lorax-data-") as cache:
            from lorax.data.reading import (
                tables,  # lines need no pandas: it takes a second to import
            )

            table = tables.read_table(path, source.path, cache)
            kept = _places_of_split(source, len(table))
            yield tables.ArrowRows(source.path, table, kept)
    elif path.exists() or not _HUB_ID.fullmatch(source.path):
        kind = "a directory" if path.is_dir() else "a file of another kind" if path.exists() else ""
        raise SourceError(
            f"{source.path}: {kind or 'no such file, and no hub id'}; needed is a "
            f"{', '.join(SUFFIXES)} file or a hub id such as 'owner/name'"
        )
    else:
        _refuse_field(source)
        from lorax.data.reading import tables

        yield tables.open_hub(source)


def sources_of(given: Any) -> tuple[DataSource, ...]:
    """Returns the sources that were given, or those of the paths that were.

    Raises:
        DataError: If there is none.
        ConfigError: If one is neither a source nor a path.
    """
    if not isinstance(given, str) and not given:
        raise DataError(
            "no source of rows: pass a path, config.data.train, or config.data.eval if the config "
            "sets data.eval"
        )
    if isinstance(given, str) or not all(isinstance(each, DataSource) for each in given):
        return DataConfig(train=cast(Any, given)).train
    return tuple(cast(Any, given))


def _refuse_field(source: DataSource) -> None:
    if source.field is not None:
        raise DataError(
            f"{source.path}: field {source.field!r} is of a .json file that holds one object, and "
            "this is a table: remove field"
        )


def _check_file(path: Path, source: DataSource) -> None:
    if source.name is not None:
        raise DataError(
            f"{source.path}: name {source.name!r} is a hub dataset's configuration, and this is a "
            "file: remove name"
        )
    if not path.is_file():
        kind = special_kind(path.stat().st_mode) if path.exists() else None
        special = f"is {kind}, not a file" if kind else "no such file"
        reason = "is a directory" if path.is_dir() else special
        raise SourceError(f"{source.path}: {reason} (looked for {path.absolute()})")
    try:
        with path.open("rb") as file:
            head = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError as error:
        raise SourceError(f"{source.path}: it cannot be read: {explain(error)}") from error
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        raise DataError(
            f"{source.path}: this is a Git LFS pointer, not the data; run `git lfs pull`"
        )
    if head[:14].lower().startswith((b"<!doctype html", b"<html")):
        raise DataError(f"{source.path}: this is an HTML page, not data; download the file again")
    if not head:
        with path.open("rb") as file:
            if not any(line.strip() for line in file):
                raise DataError(f"{source.path}: the file is empty")


def _open_json(path: Path, source: DataSource) -> Rows:
    if path.suffix.lower() == ".json" and (document := _document(path, source)) is not None:
        elements = _rows_of(document, source)
        return NumberedRows(source.path, elements, _places_of_split(source, len(elements)))
    if source.field is not None:
        raise DataError(
            f"{source.path}: field {source.field!r} is of a .json file that holds one object, and "
            "this file holds one JSON object per line: remove field"
        )
    numbers, offsets = index_lines(path)
    kept = _places_of_split(source, len(numbers))
    return LineRows(source.path, path, numbers[kept], offsets[kept])


def _document(path: Path, source: DataSource) -> Any:
    """Returns the JSON value of the whole file; None if each line is one."""
    if _first_byte(path) == b"[":
        return parse_document(path, source.path)
    with path.open("rb") as file:
        lines = filter(bytes.strip, file)
        try:
            parse_object(next(lines, b"").removeprefix(b"\xef\xbb\xbf"))
            if next(lines, None) is not None:
                return None
        except DataError:
            pass
    try:
        return parse_document(path, source.path)
    except DataError:
        return None  # errors are reported line by line


def _rows_of(document: Any, source: DataSource) -> list[Any]:
    """Returns the rows of a JSON document: its own elements, or those of one key."""
    if isinstance(document, list):
        if source.field is not None:
            raise DataError(
                f"{source.path}: the file is a list of rows, without a key {source.field!r}: "
                "remove field"
            )
        return document
    row = check_object(document)
    holds = ", ".join(f"{show_name(key)} ({describe(value)})" for key, value in row.items())
    if source.field is not None:
        rows = row.get(source.field)
        if isinstance(rows, list) and rows:
            return rows
        raise DataError(
            f"{source.path}: field {source.field!r} must name a list of rows in it, and can name "
            f"only a key of the top level; the file's object holds {holds or 'nothing'}"
        )
    lists = [key for key, value in row.items() if is_word(key) and _is_rows(value)]
    if lists and not fitting_formats(row):
        plain = re.fullmatch(r"[\w./-]+", source.path)
        quoted = source.path if plain else json.dumps(source.path, ensure_ascii=False)
        raise DataError(
            f"{source.path}: the file is one object, which holds {holds}; name the list of the "
            f"rows with field: {lists[0]} next to its path, on a command line as "
            f"'data.train=[{{path: {quoted}, field: {lists[0]}}}]'"
        )
    if any(isinstance(value, dict) for value in row.values()) and not fitting_formats(row):
        raise DataError(
            f"{source.path}: the file is one object without a list of rows at its top level; it "
            f"holds {holds}. The setting field can name only a key of the top level: store the "
            "rows as a list there, or one a line in a .jsonl file"
        )
    return [row]


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        while block := file.read(4096).removeprefix(b"\xef\xbb\xbf"):
            if text := block.lstrip():
                return text[:1]
    return b""


def _places_of_split(source: DataSource, count: int) -> Int64[np.ndarray, " kept"]:
    """Returns the rows of a file that a split such as ``train[:10%]`` keeps, counted from 0."""
    if not count:
        raise DataError(f"{source.path}: the file holds no rows")
    if source.split == "train":
        return np.arange(count)
    from lorax.data.reading import tables

    try:
        kept = tables.slice_split(source.split, count)
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"{source.path}: split {source.split!r}: {error} A file has one split, 'train', which "
            "can be sliced as in 'train[:10%]'"
        ) from error
    if not len(kept):
        raise DataError(f"{source.path}: split {source.split!r} keeps none of {count} rows")
    return kept
