"""Parquet, CSV and hub datasets, read with `datasets`, which takes a second to import."""

import contextlib
import csv
import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
from datasets.exceptions import DatasetsError
from jaxtyping import Int64

from lorax.config.data import DataSource
from lorax.data.reading.rows import (
    DataError,
    NumberedRows,
    Row,
    Rows,
    SourceError,
    show_name,
    undecodable_place,
)
from lorax.system.wording import clip, describe

_READ_ERRORS = (DatasetsError, pyarrow.ArrowException, OSError, ValueError)


class ArrowRows(NumberedRows):
    """Rows of a table."""

    def __iter__(self) -> Iterator[Row]:
        # Arrow gives every struct of a column the keys of all of them.
        yield from map(_without_none, self._table.select(self._numbers))


def read_table(path: Path, name: str, cache: str) -> datasets.Dataset:
    """Reads a .csv or .parquet file.

    Args:
        path: The file.
        name: As the user wrote it.
        cache: Folder for the cache of `datasets`.

    Raises:
        DataError: If it is broken or holds no rows.
    """
    return (_read_csv if path.suffix.lower() == ".csv" else _read_parquet)(path, name, cache)


def slice_split(split: str, count: int) -> Int64[np.ndarray, " kept"]:
    """Returns the rows of `count` that a split such as ``train[:10%]`` keeps, counted from 0.

    Raises:
        ValueError: If it is no split of them; or AssertionError.
    """
    instruction = datasets.ReadInstruction.from_spec(split)
    parts = instruction.to_absolute({"train": count})
    return np.concatenate([np.arange(part.from_, part.to) for part in parts])


def _read_csv(path: Path, name: str, cache: str) -> datasets.Dataset:
    try:
        columns = _check_csv(path, name)
        # Every cell stays text: no numbers, no dates, and "NA" is no missing value.
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
    """Returns the column names; refuses records that pandas would silently shift or fill."""
    limit = csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        records = filter(None, reader)
        try:
            columns = next(records)
            _refuse_other_separator(columns, f"{name}:{reader.line_num}")
            _check_columns(columns, f"{name}:{reader.line_num}")
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


def _refuse_other_separator(columns: list[str], place: str) -> None:
    """Refuses a header of one column in which another separator than a comma divides the names."""
    kinds = {";": "semicolons", "\t": "tabs"}
    parted = [kind for mark, kind in kinds.items() if len(columns) == 1 and mark in columns[0]]
    if parted:
        raise DataError(
            f"{place}: the header has {parted[0]} and no comma; a .csv file needs commas between "
            "its columns: save it with commas"
        )


def _check_columns(columns: list[str], place: str) -> None:
    """Refuses names by which a column cannot be found."""
    nameless = [str(i) for i, column in enumerate(columns, start=1) if not column.strip()]
    if nameless:
        raise DataError(
            f"{place}: column {' and '.join(nameless)} of {len(columns)} has no name: name it, or "
            "leave it out (pandas writes its index so, unless with to_csv(index=False))"
        )
    if len(set(columns)) != len(columns):
        # Without a header it is the first row: its words may be training text.
        twice = next(column for column in columns if columns.count(column) > 1)
        raise DataError(f"{place}: a column name appears twice in the header: {show_name(twice)}")


def _read_parquet(path: Path, name: str, cache: str) -> datasets.Dataset:
    try:
        _check_columns(pyarrow.parquet.read_schema(path).names, name)
        if pyarrow.parquet.read_metadata(path).num_rows == 0:
            raise DataError(f"{name}: the file holds no rows")
        with _without_progress_bars():
            return _table(datasets.Dataset.from_parquet, path, cache)
    except DataError:
        raise
    except _READ_ERRORS as error:
        raise _unreadable(name, error) from error


def _table(read: Any, path: Path, cache: str, **options: Any) -> datasets.Dataset:
    # `datasets` reads the path as a pattern: "a[1].jsonl" would find nothing.
    return read(glob.escape(str(path.absolute())), cache_dir=cache, **options)


def _unreadable(name: str, error: BaseException) -> DataError:
    said = " ".join(describe(error.__cause__ or error).split())
    return DataError(f"{name}: cannot be read: {clip(said, 300)}")


def open_hub(source: DataSource) -> Rows:
    """Opens a hub dataset.

    Raises:
        DataError: If there is none, or it holds no rows.
    """
    try:
        with _without_progress_bars():
            table = datasets.load_dataset(source.path, source.name, split=source.split)
    except _READ_ERRORS as error:
        what = f"configuration {source.name!r}, " if source.name else ""
        raise SourceError(
            f"{source.path}: cannot load this hub dataset ({what}split {source.split!r}): "
            f"{clip(describe(error.__cause__ or error), 300)}"
        ) from error
    if not isinstance(table, datasets.Dataset):
        raise DataError(f"{source.path}: split {source.split!r} gave {type(table).__name__}")
    if not len(table):
        raise DataError(f"{source.path}: split {source.split!r} holds no rows")
    return ArrowRows(f"{source.path} ({source.split})", table, np.arange(len(table)))


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    bars_were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not bars_were_off:
            datasets.enable_progress_bars()


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) if isinstance(item, dict | list) else item for item in value]
    return value
