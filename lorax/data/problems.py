"""What is wrong with rows, told together: each kind once, with its number and first places."""

import re
from typing import NamedTuple

from lorax.data.rows import DataError, MalformedRowError

_PLACES = 3
_KINDS = 8


class Problem(NamedTuple):
    """Rows with one problem: how many, the first places, what is said of the first, its class."""

    rows: int
    places: tuple[str, ...]
    message: str
    kind: type[DataError]


class Problems:
    """Collects what is wrong with rows. Messages that differ in numbers alone are of one kind."""

    def __init__(self):
        self._found: dict[str, Problem] = {}

    def __len__(self) -> int:
        return sum(problem.rows for problem in self._found.values())

    def add(self, place: str, error: DataError) -> None:
        """Notes what is wrong with the row at a place."""
        message = str(error)
        key = re.sub(r"\d+", "#", message)
        known = self._found.get(key, Problem(0, (), message, type(error)))
        places = known.places if len(known.places) == _PLACES else (*known.places, place)
        self._found[key] = known._replace(rows=known.rows + 1, places=places)

    def check(self, read: int, *, stopped: str = "") -> None:
        """Raises DataError if there is a problem.

        Args:
            read: Rows that were read.
            stopped: Why no more were.
        """
        if not self._found:
            return
        problems = sorted(self._found.values(), key=lambda problem: -problem.rows)
        unread = any(issubclass(problem.kind, MalformedRowError) for problem in problems)
        remedy = "mend what cannot be read, or set data.malformed: drop" * unread
        if len(self) == 1:
            lines = [f"{problems[0].places[0]}: {problems[0].message}"]
        else:
            lines = [f"{len(self):,} of {read:,} rows cannot be used{stopped}:"]
            lines += map(_describe, problems[:_KINDS])
        if others := problems[_KINDS:]:
            rows = sum(problem.rows for problem in others)
            lines.append(f"{rows:,} rows with {len(others):,} other problems")
        raise DataError("\n  ".join([*lines, *filter(None, [remedy])]))


def _describe(problem: Problem) -> str:
    more = problem.rows - len(problem.places)
    places = ", ".join(problem.places) + f" and {more:,} more rows" * (more > 0)
    return f"{places}: {problem.message}"
