"""Files and hub datasets, opened as rows."""

import contextlib
import csv
import glob
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
from datasets.exceptions import DatasetsError
from jaxtyping import Int64

from lorax.config import DataSource
from lorax.data.rows import (
    DataError,
    LineRows,
    Rows,
    TableRows,
    index_lines,
    parse_array,
    show_name,
    undecodable_place,
)

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_READ_ERRORS = (DatasetsError, pyarrow.ArrowException, OSError, ValueError)


@contextlib.contextmanager
def open_source(source: DataSource) -> Iterator[Rows]:
    """Opens a file or a hub dataset for the length of a `with` block.

    A file is read anew each time: what `datasets` caches of a table goes to a temporary directory
    that is gone afterwards, so a changed file is never served stale. Reading a file sends nothing.

    Args:
        source: The path ends in .jsonl, .json, .parquet or .csv, or is a hub id.

    Yields:
        At least one row.

    Raises:
        DataError: If there is no such file or dataset, or it is empty or broken; names the file
            and, where there is one, the line.
    """
    path = Path(source.path)
    if path.suffix.lower() in SUFFIXES:
        _check_file(path, source)
        if path.suffix.lower() in (".json", ".jsonl"):
            yield _open_json(path, source)
            return
        with tempfile.TemporaryDirectory(prefix="lorax-data-") as cache:
            yield _open_table(path, source, cache)
    elif path.exists() or not _HUB_ID.fullmatch(source.path):
        kind = "a directory" if path.is_dir() else "a file of another kind" if path.exists() else ""
        raise DataError(
            f"{source.path}: {kind or 'no such file, and no hub id'}; needed is a "
            f"{', '.join(SUFFIXES)} file or a hub id such as 'owner/name'"
        )
    else:
        yield _open_hub(source)


def _check_file(path: Path, source: DataSource) -> None:
    if source.name is not None:
        raise DataError(
            f"{source.path}: name {source.name!r} is a hub dataset's configuration, and this is a "
            "file: remove name"
        )
    if not path.is_file():
        reason = "is a directory" if path.is_dir() else "no such file"
        raise DataError(f"{source.path}: {reason} (looked for {path.absolute()})")
    with path.open("rb") as file:
        head = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
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
    if path.suffix.lower() == ".json" and _first_byte(path) == b"[":
        elements = parse_array(path, source.path)
        return TableRows(source.path, elements, _places_of_split(source, len(elements)))
    numbers, offsets = index_lines(path)
    kept = _places_of_split(source, len(numbers))
    return LineRows(source.path, path, numbers[kept], offsets[kept])


def _open_table(path: Path, source: DataSource, cache: str) -> Rows:
    read = _read_csv if path.suffix.lower() == ".csv" else _read_parquet
    table = read(path, source.path, cache)
    return TableRows(source.path, table, _places_of_split(source, len(table)))


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        while block := file.read(4096).removeprefix(b"\xef\xbb\xbf"):
            if text := block.lstrip():
                return text[:1]
    return b""


def _read_csv(path: Path, name: str, cache: str) -> datasets.Dataset:
    try:
        columns = _check_csv(path, name)
        # Every cell stays the text it is: no numbers, no dates, and "NA" is no missing value.
        options: dict[str, Any] = {
            "features": datasets.Features({column: datasets.Value("string") for column in columns}),
            "keep_default_na": False,
            "na_filter": False,
            "encoding": "utf-8-sig",
        }
        with _without_progress_bars():
            return _table(datasets.Dataset.from_csv, path, cache, **options)
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{undecodable_place(path, name)}: invalid UTF-8") from error
    except _READ_ERRORS as error:
        raise _unreadable(name, error) from error


def _check_csv(path: Path, name: str) -> list[str]:
    """Returns the column names; refuses records that pandas would shift or fill in silence."""
    limit = csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        records = filter(None, reader)
        try:
            columns = next(records)
            if len(set(columns)) != len(columns):
                # Without a header it is the first row: its words may be training text.
                twice = next(column for column in columns if columns.count(column) > 1)
                raise DataError(
                    f"{name}:1: a column name stands twice in the header: {show_name(twice)}"
                )
            empty = True
            for record in records:
                empty = False
                if len(record) != len(columns):
                    raise DataError(
                        f"{name}:{reader.line_num}: the record has {len(record)} fields and the "
                        f"header {len(columns)}; a field with a comma needs quotes"
                    )
        except csv.Error as error:
            raise DataError(f"{name}:{reader.line_num}: invalid CSV: {error}") from error
        finally:
            csv.field_size_limit(limit)
    if empty:
        raise DataError(f"{name}: the file holds no rows")
    return columns


def _read_parquet(path: Path, name: str, cache: str) -> datasets.Dataset:
    try:
        if pyarrow.parquet.read_metadata(path).num_rows == 0:
            raise DataError(f"{name}: the file holds no rows")
        with _without_progress_bars():
            return _table(datasets.Dataset.from_parquet, path, cache)
    except DataError:
        raise
    except _READ_ERRORS as error:
        raise _unreadable(name, error) from error


def _table(read: Any, path: Path, cache: str, **options: Any) -> datasets.Dataset:
    # `datasets` takes the path for a pattern: "a[1].jsonl" would find nothing.
    return read(glob.escape(str(path.absolute())), cache_dir=cache, **options)


def _unreadable(name: str, error: BaseException) -> DataError:
    return DataError(f"{name}: cannot be read: {str(error.__cause__ or error).strip()}")


def _open_hub(source: DataSource) -> Rows:
    try:
        with _without_progress_bars():
            table = datasets.load_dataset(source.path, source.name, split=source.split)
    except _READ_ERRORS as error:
        what = f"configuration {source.name!r}, " if source.name else ""
        raise DataError(
            f"{source.path}: cannot load this hub dataset ({what}split {source.split!r}): "
            f"{error.__cause__ or error}"
        ) from error
    if not isinstance(table, datasets.Dataset):
        raise DataError(f"{source.path}: split {source.split!r} gave {type(table).__name__}")
    if not len(table):
        raise DataError(f"{source.path}: split {source.split!r} holds no rows")
    return TableRows(f"{source.path} ({source.split})", table, np.arange(len(table)))


def _places_of_split(source: DataSource, count: int) -> Int64[np.ndarray, " kept"]:
    """Returns which of a file's rows a split such as ``train[:10%]`` keeps, counted from 0."""
    if not count:
        raise DataError(f"{source.path}: the file holds no rows")
    try:
        instruction = datasets.ReadInstruction.from_spec(source.split)
        parts = instruction.to_absolute({"train": count})
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"{source.path}: split {source.split!r}: {error} A file has one split, 'train', which "
            "can be sliced as in 'train[:10%]'"
        ) from error
    kept = np.concatenate([np.arange(part.from_, part.to) for part in parts])
    if not len(kept):
        raise DataError(f"{source.path}: split {source.split!r} keeps none of {count} rows")
    return kept


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    bars_were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not bars_were_off:
            datasets.enable_progress_bars()
