"""Reading a JSON object field by field, so that no field is ever ignored."""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from lorax.system.wording import clip, show

REQUIRED: Final = object()
"""The default of a field that must be there."""


class JsonFields:
    """The fields of one JSON object, each read once; `finish` refuses those that were not read.

    A field that is null counts as absent, as in transformers.

    Args:
        values: The object.
        where: The file, for messages.
        prefix: Place of the object in the file, for messages (``"rope_scaling."``).
    """

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = ""):
        self.values = values
        self.where = where
        self.prefix = prefix
        self._read: set[str] = set()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Keeps a note for the user."""
        self.notes.append(f"{self.where}: {self.prefix}{text}")

    def error(self, name: str, text: str) -> ValueError:
        """Returns the error that names file, field and value."""
        return ValueError(f"{self.where}: {self.prefix}{name} {text}, got {self._show(name)}")

    def _show(self, name: str) -> str:
        """Returns a value as Python writes it, clipped."""
        value = self.values.get(name)
        return "null" if value is None else show(value)

    def raw(self, name: str, default: Any = REQUIRED) -> Any:
        """Returns the value unchanged, or `default` if it is absent or null."""
        self._read.add(name)
        value = self.values.get(name)
        if value is None and default is REQUIRED:
            raise ValueError(f"{self.where}: {self.prefix}{name} is missing")
        return default if value is None else value

    def integer(
        self, name: str, default: Any = REQUIRED, *, minimum: int = 1, maximum: int = 2**31 - 1
    ) -> Any:
        """Returns an integer in ``[minimum, maximum]``, or the default."""
        value = self.raw(name, default)
        if value is default:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(name, f"must be an integer of at least {minimum}")
        if value > maximum:
            raise self.error(name, f"must be at most {maximum:,}")
        return value

    def number(self, name: str, default: Any = REQUIRED, *, minimum: float, above=False) -> Any:
        """Returns a finite float of at least (or `above`) `minimum`, or the default."""
        value = self.raw(name, default)
        if value is default:
            return default
        good = isinstance(value, int | float) and not isinstance(value, bool)
        try:
            number = float(value) if good else math.nan
        except OverflowError:
            number = math.inf
        if not (math.isfinite(number) and (number > minimum if above else number >= minimum)):
            raise self.error(
                name, f"must be a number {'above' if above else 'of at least'} {minimum}"
            )
        return number

    def boolean(self, name: str, default: Any = REQUIRED) -> Any:
        """Returns true or false, or the default."""
        value = self.raw(name, default)
        if value is not default and not isinstance(value, bool):
            raise self.error(name, "must be true or false")
        return value

    def token_id(self, name: str) -> int | tuple[int, ...] | None:
        """Returns a token id, several, or None."""
        value = self.raw(name, None)
        ids = value if isinstance(value, list) else [value]
        if value is not None and any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
            raise self.error(name, "must be a token id or a list of them")
        if value is not None and any(abs(i) >= 2**31 for i in ids):
            raise self.error(name, "must be below 2³¹, as token ids are")
        return tuple(ids) if isinstance(value, list) else value

    def only(self, name: str, allowed: Iterable[Any], reason: str) -> None:
        """Refuses all values except those that change nothing."""
        value = self.raw(name, None)
        allowed = tuple(allowed)

        # A bool equals 0 or 1 in Python, but not in JSON.
        def same(a, b):
            return a == b and isinstance(a, bool) == isinstance(b, bool)

        if value is not None and not any(same(value, a) for a in allowed):
            needed = " or ".join(repr(a) for a in allowed) or "absent"
            raise self.error(name, f"must be {needed} ({reason})")

    def ignore(self, names: Iterable[str]) -> None:
        """Marks fields as known to change nothing."""
        self._read.update(names)

    def finish(self, neutral: Callable[[str, Any], str | None] = lambda *_: None) -> None:
        """Refuses every field that was not read, naming the nearest known one.

        Args:
            neutral: Returns why a name and a value change nothing, or None if they may. Fields that
                change nothing are noted.
        """
        unknown = {name: value for name, value in self.values.items() if name not in self._read}
        reasons = {name: neutral(name, value) for name, value in unknown.items()}
        if told := [name for name, reason in reasons.items() if reason]:
            listed = ", ".join(f"{clip(n)}={self._show(n)} ({reasons[n]})" for n in told)
            self.note(f"{listed}: not read by lorax, and nothing that it computes depends on it")
        refused = [name for name, reason in reasons.items() if not reason]
        if refused:
            found = ". ".join(map(self._describe_unknown, refused))
            which = "It may change" if len(refused) == 1 else "They may change"
            them = "it is not ignored; remove it if it does not"
            if len(refused) > 1:
                them = "they are not ignored; remove those that do not"
            raise ValueError(f"{self.where}: {found}. {which} what the model computes, so {them}")

    def _describe_unknown(self, name: str) -> str:
        near = difflib.get_close_matches(name[:100], sorted(self._read), n=1)
        hint = f"; the nearest known field is {near[0]}" if near else ""
        shown = f"{self.prefix}{clip(name)}={self._show(name)}"
        return f"{shown} is not a field that lorax knows here{hint}"
