"""Problems of rows, reported together: each kind once, with its count and first places."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from lorax.data.reading.rows import DataError, MalformedRowError
from lorax.system.wording import plural

_PLACES = 3
_KINDS = 20


class Problem(NamedTuple):
    """One kind of problem: number of rows, first places, message of the first, class of error."""

    rows: int
    places: tuple[str, ...]
    message: str
    kind: type[DataError]


class Problems:
    """Collects problems of rows. Messages that differ in numbers alone are of one kind."""

    def __init__(self):
        self._found: dict[str, Problem] = {}
        self._rows = 0
        self._last = ""

    def __len__(self) -> int:
        """Returns the number of rows with a problem; those of one row are added consecutively."""
        return self._rows

    @property
    def kinds(self) -> list[Problem]:
        """The kinds of problems, the most frequent first."""
        return sorted(self._found.values(), key=lambda problem: -problem.rows)

    def add(self, place: str, error: DataError) -> None:
        """Adds a problem of the row at a place."""
        message = str(error)
        self._rows += place != self._last
        self._last = place
        key = re.sub(r"\d+", "#", message)
        known = self._found.get(key, Problem(0, (), message, type(error)))
        places = known.places if len(known.places) == _PLACES else (*known.places, place)
        self._found[key] = known._replace(rows=known.rows + 1, places=places)

    def check(
        self, read: int, *, stopped: str = "", lost: int = 0, more: Sequence[str] = ()
    ) -> None:
        """Raises DataError if there is a problem.

        Args:
            read: Rows that were read.
            stopped: Why reading stopped, if it did.
            lost: Number of rows that `more` is about.
            more: Further problems, a sentence each.
        """
        problems = self.kinds
        if not problems and len(more) < 2:
            if more:
                raise DataError(more[0])
            return
        unread = any(issubclass(problem.kind, MalformedRowError) for problem in problems)
        remedy = "fix what cannot be read, or set data.malformed: drop" * unread
        if len(problems) == 1 and len(self) == 1 and not more:
            lines = [f"{problems[0].places[0]}: {problems[0].message}"]
        else:
            rows = min(len(self) + lost, read)  # a conversation may become several that are lost
            lines = [f"{rows:,} of {plural(read, 'row')} cannot be used{stopped}:"]
            lines += map(_describe, problems[:_KINDS])
        if others := problems[_KINDS:]:
            rows = sum(problem.rows for problem in others)
            firsts = ", ".join(problem.places[0] for problem in others)
            what = plural(len(others), "other problem")
            lines.append(f"{plural(rows, 'row')} with {what}, first: {firsts}")
        raise DataError("\n  ".join([*lines, *more, *filter(None, [remedy])]))


def _describe(problem: Problem) -> str:
    more = problem.rows - len(problem.places)
    places = ", ".join(problem.places) + f" and {plural(more, 'more row')}" * (more > 0)
    return f"{places}: {problem.message}"
