"""Changes to the files of a case, as data: what a seed gave can be written down and done again."""

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml.error import YAMLError

from tests.fuzz import structure
from tests.fuzz.structure import Pairs

WORDS = "words"
"""In the place of a file: the words of the command."""


class UnfitError(Exception):
    """An edit that cannot be done here, as to a key that an edit before it has deleted."""


@dataclasses.dataclass(frozen=True)
class Edit:
    """One change.

    Attributes:
        file: Which file, relative to the folder of the case.
        op: A function of this file, below.
        at: Keys and indices down to a value; or byte offsets.
        value: What is put there; bytes as hex, other text than JSON's as ``{"raw": text}``.
    """

    file: str
    op: str
    at: Sequence[Any] = ()
    value: Any = None

    def __str__(self) -> str:
        place = ".".join(map(str, self.at))
        value = "" if self.value is None and self.op != "set" else f" {self.value!r}"
        return f"{self.op} {self.file}{':' * bool(place)}{place}{value}"


def apply(folder: Path, edit: Edit) -> None:
    """Changes a file of a case."""
    path = folder / edit.file
    if edit.op in FILE_OPS:
        FILE_OPS[edit.op](path, edit)
        return
    if path.is_symlink() or not path.is_file():
        raise UnfitError("what an edit before has put there has no end")
    data = path.read_bytes()
    if edit.op in BYTE_OPS:
        data = BYTE_OPS[edit.op](data, edit)
    else:
        try:
            root = structure.read(edit.file, data)
        except (ValueError, YAMLError) as error:  # what an edit before has made of it
            raise UnfitError(str(error)) from error
        data = structure.write(edit.file, change(root, edit), data)
    path.unlink()  # it may be linked to elsewhere
    path.write_bytes(data)


def apply_words(words: list[str], edit: Edit) -> list[str]:
    """Returns the words of the command, changed."""
    return structure.plain(change(list(words), edit))


def change(root: Any, edit: Edit) -> Any:
    """Returns a document with one value changed."""
    around = [None, root]  # so that the root too has a place
    holder: Any = around
    place: Any = 1
    for key in edit.at:
        holder, place = holder[place], key
        if isinstance(holder, Pairs):
            index = next((i for i, (name, _) in enumerate(holder) if name == key), None)
            if index is None:
                raise UnfitError(f"no key {key!r}")
            holder, place = holder[index], 1
        elif not (isinstance(holder, list) and isinstance(key, int) and key < len(holder)):
            raise UnfitError(f"no entry {key!r}")
    STRUCTURE_OPS[edit.op](holder, place, edit, around)
    return around[1]


def _set(holder: Any, place: int, edit: Edit, around: Any) -> None:
    holder[place] = structure.keyed(edit.value)


def _delete(holder: Any, place: int, edit: Edit, around: Any) -> None:
    above, index = _entry(edit, around)
    del above[index]


def _rename(holder: Any, place: int, edit: Edit, around: Any) -> None:
    above, index = _entry(edit, around)
    if not isinstance(above, Pairs):
        raise UnfitError("an entry of a list has no name")
    above[index][0] = edit.value


def _twice(holder: Any, place: int, edit: Edit, around: Any) -> None:
    above, index = _entry(edit, around)
    above.append(list(above[index]) if isinstance(above, Pairs) else above[index])


def _add(holder: Any, place: int, edit: Edit, around: Any) -> None:
    value = holder[place]
    if isinstance(value, Pairs):
        value.append([edit.value[0], structure.keyed(edit.value[1])])
    elif isinstance(value, list):
        value.append(structure.keyed(edit.value[1]))
    else:
        raise UnfitError("nothing can be added to a value")


def _entry(edit: Edit, around: Any) -> tuple[Any, int]:
    """Returns the list or object that holds the place, and where in it that is."""
    if not edit.at:
        raise UnfitError("the whole document has no place in another")
    above = around[1]
    for key in edit.at[:-1]:
        above = above.get(key) if isinstance(above, Pairs) else above[key]
    if isinstance(above, Pairs):
        return above, next(i for i, (name, _) in enumerate(above) if name == edit.at[-1])
    return above, edit.at[-1]


STRUCTURE_OPS: dict[str, Callable[..., None]] = {
    "set": _set,
    "delete": _delete,
    "rename": _rename,
    "twice": _twice,
    "add": _add,
}


def _offset(data: bytes, edit: Edit) -> int:
    return min(edit.at[0], len(data))


def _flip(data: bytes, edit: Edit) -> bytes:
    if not data:
        raise UnfitError("nothing to flip in an empty file")
    place = edit.at[0] % len(data)
    return data[:place] + bytes([data[place] ^ edit.value]) + data[place + 1 :]


def _replace(data: bytes, edit: Edit) -> bytes:
    old, new = (text.encode("utf-8", "surrogatepass") for text in edit.value)
    if old not in data:
        raise UnfitError(f"no {old!r}")
    return data.replace(old, new, edit.at[0] if edit.at else -1)


BYTE_OPS: dict[str, Callable[[bytes, Edit], bytes]] = {
    "cut": lambda data, edit: data[: _offset(data, edit)],
    "insert": lambda data, edit: (
        data[: _offset(data, edit)] + bytes.fromhex(edit.value) + data[_offset(data, edit) :]
    ),
    "flip": _flip,
    "replace": _replace,
    "content": lambda data, edit: edit.value.encode("utf-8", "surrogatepass"),
    "bytes": lambda data, edit: bytes.fromhex(edit.value),
}


def _clear(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _link(path: Path, edit: Edit) -> None:
    _clear(path)
    path.symlink_to(edit.value)


def _pipe(path: Path, edit: Edit) -> None:
    _clear(path)
    os.mkfifo(path)


def _folder(path: Path, edit: Edit) -> None:
    _clear(path)
    path.mkdir()


def _move(path: Path, edit: Edit) -> None:
    path.rename(path.with_name(edit.value))


def _table(path: Path, edit: Edit) -> None:
    """Makes a table of rows in JSON lines, beside them."""
    if path.is_symlink() or not path.is_file():
        raise UnfitError("no rows to make a table of")
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    try:
        rows = [structure.plain(row) for row in structure.read(path.name, path.read_bytes())]
        table = pyarrow.Table.from_pylist(rows)
        if edit.value == "parquet":
            pyarrow.parquet.write_table(table, path.with_suffix(".parquet"))
        else:
            pyarrow.csv.write_csv(table, path.with_suffix(".csv"))
    except (ValueError, TypeError, AttributeError, OverflowError, pyarrow.ArrowException) as error:
        raise UnfitError(f"no table: {error}") from error


def _array(path: Path, edit: Edit) -> None:
    """Makes a JSON file of rows in JSON lines, beside them; indented if the value says so."""
    if path.is_symlink() or not path.is_file():
        raise UnfitError("no rows to make an array of")
    lines = path.read_bytes().splitlines()
    joint = b",\n  " if edit.value else b","
    path.with_suffix(".json").write_bytes(b"[" + joint.join(lines) + b"]")


FILE_OPS: dict[str, Callable[[Path, Edit], object]] = {
    "remove": lambda path, edit: _clear(path),
    "link": _link,
    "pipe": _pipe,
    "folder": _folder,
    "move": _move,
    "table": _table,
    "array": _array,
    "create": lambda path, edit: path.write_bytes(bytes.fromhex(edit.value)),
}
