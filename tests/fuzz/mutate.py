"""Random changes that know the structure of what they change."""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.fuzz.edits import Edit
from tests.fuzz.structure import Pairs, Raw

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
LONG = "long " * 4000

NUMBERS: list[Any] = [
    *(0, -1, 1, 2, 3, 7, 0.5, -0.0, 1e308, 1e-320, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**18),
    *({"raw": text} for text in ("NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400)),
]
TEXTS = [
    *("", " ", "0", "1", "1e-4", "true", "null", "None", "NaN", "auto", "Ünïcode 数", "a\nb", "\t"),
    *("\0", "a\0b", "\ud800", "\u202e", "\ufeff", "e\u0301", "[", "{{", "'", '"', "%s", "$HOME"),
    *("../x", "..", ".", "/", "~", "/dev/null", "a/b", "a/b/c", "\\", "x" * 300, LONG),
]
NESTED: list[Any] = [[], {}, [None], [[]], [0], [""], {"a": {}}, {"": 0}, ["a", "a"]]
DEEP = {"raw": "[" * 2000 + "]" * 2000}
BYTES = ("00", "ff", "efbbbf", "0d0a", "c3", "eda080", "20", "0a", "7b", "5d", "22")
STAND_INS = (
    *(
        "",
        " \n",
        LFS_POINTER,
        "<!DOCTYPE html><html>404",
        "null",
        "[]",
        "{}",
        '""',
        "7",
        "[" * 9999,
    ),
    *("PK\x03\x04\0\0", "%PDF-1.7", "\ufeff{}", "{" * 99, "\0" * 64, "---\n...\n---\n"),
)
LINKS = ("/dev/zero", "/dev/null", "nowhere", "itself", "/dev/stdin", "/proc/self/mem")


def neighbours(rng: random.Random, value: Any) -> Any:
    """Returns something near a value: of its type but wrong, or right but of another type."""
    if isinstance(value, bool):
        return rng.choice([not value, int(value), str(value).lower(), str(value), None, [value]])
    if isinstance(value, int | float):
        near = [value + 1, value - 1, -value, value * 1000, value / 3, float(value), value * 2]
        return rng.choice([*near, str(value), f" {value}", [value], [value, value], bool(value)])
    if isinstance(value, str):
        near = [value + value, value[:-1], value[::-1], value.upper(), value + " ", value + "\n"]
        return rng.choice([*near, [value], {value: value}, value + "\0", "x" + value, value + LONG])
    if isinstance(value, Pairs):
        return rng.choice([{}, [], [to_json(value)], {"a": to_json(value)}, "{}", None])
    if isinstance(value, list):
        items = to_json(value)
        return rng.choice([[], items * 2, items[::-1], items[:-1], [items], {"0": items}, "[]"])
    return rng.choice([False, 0, "", "null", [], {}])


def to_json(value: Any) -> Any:
    """Returns a document in the form that the value of an edit has."""
    if isinstance(value, Pairs):
        return {key: to_json(item) for key, item in value}
    if isinstance(value, Raw):
        return {"raw": str(value)}
    return [to_json(item) for item in value] if isinstance(value, list) else value


def any_value(rng: random.Random, value: Any) -> Any:
    """Returns what may be put in the place of a value."""
    pool = rng.choices((NUMBERS, TEXTS, NESTED, (None, True, False), (DEEP,)), (4, 4, 2, 2, 0.3))[0]
    return neighbours(rng, value) if rng.random() < 0.4 else rng.choice(pool)


def walk(rng: random.Random, document: Any) -> list[Any]:
    """Returns the place of a value: keys and indices. Those near the root are met more often."""
    at: list[Any] = []
    while isinstance(document, list) and document and (not at or rng.random() < 0.75):
        index = rng.randrange(min(len(document), 400))
        if isinstance(document, Pairs):
            at.append(document[index][0])
            document = document[index][1]
        else:
            at.append(index)
            document = document[index]
    return at


def look_up(document: Any, at: Sequence[Any]) -> Any:
    """Returns the value at a place."""
    for key in at:
        document = document.get(key) if isinstance(document, Pairs) else document[key]
    return document


def change_structure(
    rng: random.Random,
    file: str,
    document: Any,
    *,
    hints: Mapping[str, Sequence[Any]] | None = None,
    new_keys: Sequence[str] = (),
) -> Edit:
    """Draws a change of a document.

    Args:
        rng: The source of chance.
        file: Its name.
        document: What is in it.
        hints: Values that a key of this name might have, which are tried more often.
        new_keys: Keys that might be added, besides nonsense.
    """
    at = walk(rng, document)
    name = next((key for key in reversed(at) if isinstance(key, str)), "")
    draw = rng.random()
    if hints and draw < 0.25:
        at = _find(rng, document, hints) or at
        name = str(at[-1])
        if name in hints:
            return Edit(file, "set", at, rng.choice(hints[name]))
    if draw < 0.6 or not at:
        return Edit(file, "set", at, any_value(rng, look_up(document, at)))
    if draw < 0.7:
        return Edit(file, "delete", at)
    if draw < 0.78 and isinstance(at[-1], str):
        return Edit(file, "rename", at, rng.choice([name.upper(), name + "s", "", "x", name[:-1]]))
    if draw < 0.84:
        return Edit(file, "twice", at)
    holders = [at[:i] for i in range(len(at)) if isinstance(look_up(document, at[:i]), Pairs)]
    key = rng.choice([*new_keys, *new_keys, "unheard_of", "", "a.b", "\ud800", "_comment"])
    value = rng.choice(hints[key]) if hints and key in hints else any_value(rng, 1)
    return Edit(file, "add", rng.choice(holders or [[]]), [key, value])


def _find(rng: random.Random, document: Any, hints: Mapping[str, Any]) -> list[Any] | None:
    found = [at for at in _places(document) if at and at[-1] in hints]
    return rng.choice(found) if found else None


def _places(document: Any, above: tuple[Any, ...] = ()) -> Iterator[list[Any]]:
    yield list(above)
    if isinstance(document, Pairs):
        for key, value in document:
            yield from _places(value, (*above, key))
    elif isinstance(document, list) and len(document) < 40:
        for index, value in enumerate(document):
            yield from _places(value, (*above, index))


def change_bytes(rng: random.Random, file: str, size: int) -> Edit:
    """Draws a change of a file's bytes."""
    draw, place = rng.random(), rng.randrange(max(size, 1))
    if draw < 0.3:
        return Edit(file, "cut", [place])
    if draw < 0.6:
        return Edit(file, "flip", [place], 1 << rng.randrange(8))
    if draw < 0.8:
        at = rng.choice([0, size, place])
        return Edit(file, "insert", [at], rng.choice(BYTES) * rng.choice([1, 1, 1, 100_000]))
    return Edit(file, "content", (), rng.choice(STAND_INS))


def change_file(rng: random.Random, file: str) -> Edit:
    """Draws something else in the place of a file."""
    name = file.rsplit("/", 1)[-1]
    link = rng.choice(LINKS)
    return rng.choice(
        [
            Edit(file, "remove"),
            Edit(file, "folder"),
            Edit(file, "pipe"),
            Edit(file, "link", (), name if link == "itself" else link),
        ]
    )
