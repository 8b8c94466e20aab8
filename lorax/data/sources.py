"""Files and hub datasets, opened as rows."""

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from lorax.config import DataSource
from lorax.data.rows import (
    DataError,
    LineRows,
    NumberedRows,
    Rows,
    index_lines,
    parse_array,
)

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


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
            from lorax.data import tables  # lines need no pandas: it takes a second to import

            table = tables.read_table(path, source.path, cache)
            kept = _places_of_split(source, len(table))
            yield tables.ArrowRows(source.path, table, kept)
    elif path.exists() or not _HUB_ID.fullmatch(source.path):
        kind = "a directory" if path.is_dir() else "a file of another kind" if path.exists() else ""
        raise DataError(
            f"{source.path}: {kind or 'no such file, and no hub id'}; needed is a "
            f"{', '.join(SUFFIXES)} file or a hub id such as 'owner/name'"
        )
    else:
        from lorax.data import tables

        yield tables.open_hub(source)


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
        return NumberedRows(source.path, elements, _places_of_split(source, len(elements)))
    numbers, offsets = index_lines(path)
    kept = _places_of_split(source, len(numbers))
    return LineRows(source.path, path, numbers[kept], offsets[kept])


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        while block := file.read(4096).removeprefix(b"\xef\xbb\xbf"):
            if text := block.lstrip():
                return text[:1]
    return b""


def _places_of_split(source: DataSource, count: int) -> Int64[np.ndarray, " kept"]:
    """Returns which of a file's rows a split such as ``train[:10%]`` keeps, counted from 0."""
    if not count:
        raise DataError(f"{source.path}: the file holds no rows")
    if source.split == "train":
        return np.arange(count)
    from lorax.data import tables

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
