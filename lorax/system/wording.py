"""Short wordings of values and errors for messages."""

import difflib
import math
import re
from collections.abc import Iterable
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


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns what to put after a word that is not known: ` (did you mean …?)`, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def plural(count: int, noun: str, many: str | None = None) -> str:
    """Returns how many there are of a thing, as `1 row` or `2,000 rows`; `many` are its plural."""
    return f"{count:,} {noun if count == 1 else many or f'{noun}s'}"


def format_number(value: float | None) -> str:
    """Returns a number in at most six characters, as `0.250`, `12.3k` or `3e-07`; None is `-`."""
    if value is None:
        return "-"
    if 0 < abs(value) < 0.01:
        return f"{value:.1g}"
    unit = ""
    for larger in "kMGT":
        if not 999.5 <= abs(value) < math.inf:
            break
        value /= 1000
        unit = larger
    return f"{value:#.3g}".rstrip(".") + unit


def format_time(seconds: float) -> str:
    """Returns a duration in at most seven characters: `1:02:05`, `31h05m` or `12d04h`."""
    if not math.isfinite(seconds):
        return "-"
    whole = round(seconds)
    minutes = whole // 60
    hours = minutes // 60
    if hours < 10:
        return f"{hours}:{minutes % 60:02}:{whole % 60:02}"
    return f"{hours}h{minutes % 60:02}m" if hours < 100 else f"{hours // 24}d{hours % 24:02}h"


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
