"""Short wordings of values and errors for messages."""

import re
from typing import Any

LONGEST = 100
"""Characters of a value that a message shows."""

_DIGITS = 30
_NUL = re.compile(r"embedded null (byte|character)")
_TOO_MANY_DIGITS = "Exceeds the limit"  # of Python, for a number written in digits


def clip(text: str, longest: int = LONGEST) -> str:
    """Returns the text, or its beginning and the number of characters left out."""
    if len(text) <= longest:
        return text
    return f"{text[:longest]}… ({len(text) - longest:,} characters more)"


def clip_words(text: str, longest: int = 500) -> str:
    """Returns the text with each of its words clipped; lines and spaces stay."""
    return re.sub(rf"\S{{{longest + 1},}}", lambda found: clip(found[0], longest), text)


def show(value: Any) -> str:
    """Returns a value from a JSON or YAML file as Python writes it, clipped; null is null."""
    if value is None:
        return "null"
    if isinstance(value, int) and abs(value) >= 10**_DIGITS:
        # Python refuses to write a number of more than 4,300 digits.
        return f"a number of about {round(value.bit_length() * 0.30103):,} digits"
    if isinstance(value, str) and len(value) > LONGEST:
        return f"{value[:LONGEST]!r}… ({len(value) - LONGEST:,} characters more)"
    try:
        return clip(repr(value))
    except (ValueError, RecursionError):
        return "a value that is too large to be shown"


def kind_of(value: Any) -> str:
    """Returns the kind of a value from a JSON file."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    kinds = {str: "text", list: "list", dict: "object", int: "number", float: "number"}
    return kinds.get(type(value), type(value).__name__)


def describe(error: BaseException) -> str:
    """Returns an error in words for the user: for a system error, the file and the reason."""
    if isinstance(error, OSError) and error.strerror:
        file = f"{error.filename}: " if error.filename else ""
        return clip_words(f"{file}{error.strerror}")
    return explain(error) if _NUL.search(str(error)) else clip_words(str(error))


def explain(error: BaseException) -> str:
    """Returns the reason in an error of the system or of Python, without its jargon."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = str(error)
    if _NUL.search(said):
        return "the path holds a NUL character, which no path can"
    if _TOO_MANY_DIGITS in said:
        return "a number in it has more than 4,300 digits"
    return clip(said, 300)
