"""Reading a JSON object field by field, so that no field is ever ignored."""

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

REQUIRED: Final = object()
"""The default of a field that must be there."""


class JsonFields:
    """The fields of one JSON object, each read once; `finish` refuses what nobody asked for.

    A field that is null counts as absent, as in transformers.

    Args:
        values: The object.
        where: The file, for messages.
        prefix: Where the object stands in the file, for messages (``"rope_scaling."``).
    """

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = ""):
        self.values, self.where, self.prefix = values, where, prefix
        self._read: set[str] = set()

    def error(self, name: str, text: str) -> ValueError:
        """Returns the error that names file, field and value."""
        return ValueError(
            f"{self.where}: {self.prefix}{name} {text}, got {self.values.get(name)!r}"
        )

    def raw(self, name: str, default: Any = REQUIRED) -> Any:
        """Returns the value as it stands, or `default` if it is absent or null."""
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
        if not (good and math.isfinite(value) and (value > minimum if above else value >= minimum)):
            raise self.error(
                name, f"must be a number {'above' if above else 'of at least'} {minimum}"
            )
        return float(value)

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
        return tuple(ids) if isinstance(value, list) else value

    def only(self, name: str, allowed: Iterable[Any], reason: str) -> None:
        """Refuses any value but those that change nothing."""
        value, allowed = self.raw(name, None), tuple(allowed)
        # A bool equals 0 or 1 in Python, but not in JSON.
        same = lambda a, b: a == b and isinstance(a, bool) == isinstance(b, bool)
        if value is not None and not any(same(value, a) for a in allowed):
            needed = " or ".join(repr(a) for a in allowed) or "absent"
            raise self.error(name, f"must be {needed} ({reason})")

    def ignore(self, names: Iterable[str]) -> None:
        """Marks fields as known to change nothing."""
        self._read.update(names)

    def finish(self) -> None:
        """Refuses every field that was not read, naming the nearest known one."""
        for name in self.values:
            if name not in self._read:
                near = difflib.get_close_matches(name, sorted(self._read), n=1)
                hint = f"; the nearest known field is {near[0]}" if near else ""
                raise ValueError(
                    f"{self.where}: {self.prefix}{name}={self.values[name]!r} is not a field that "
                    f"lorax knows here{hint}. It may change what the model computes, so it is not "
                    "ignored; remove it if it does not"
                )
