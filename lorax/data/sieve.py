"""The sieve: keeps encoded rows, drops or refuses others, and reports both."""

from lorax.config.data import DataConfig
from lorax.data.dataset import Change, EncodedRow, EncodeReport, RowWriter, tell_ignored
from lorax.data.problems import Problems
from lorax.data.reading.formats import ROW_KINDS, RowKind
from lorax.data.reading.rows import DataError, MalformedRowError
from lorax.system.wording import plural

_TRIED = 1000
"""Reading stops after this many rows of which none can be used."""


_DROPPED = "dropped, malformed (data.malformed: drop)"


class Sieve:
    """Keeps the rows that can be trained on; counts the others and the changes to rows."""

    def __init__(self, config: DataConfig, kept: RowWriter) -> None:
        self._config = config
        self._kept = kept
        self._problems = Problems()
        self._dropped = Problems()
        self._changes: dict[str, Change] = {}
        self._kinds: set[RowKind] = set()
        self._first_overlong = self._first_unsupervised = ""
        self.read = self.truncated = self.overlong = self.unsupervised = 0

    def add(self, encoded: EncodedRow, place: str, kind: RowKind) -> None:
        """Adds an encoded row, cut or dropped as the config asks."""
        tokens, supervised = encoded
        limit = self._config.max_seq_length
        if len(tokens) > limit:
            self._first_overlong = self._first_overlong or f"{place} has {len(tokens)} tokens"
            if self._config.overlong == "truncate":
                self.truncated += 1
                tokens = tokens[:limit]
                supervised = supervised[:limit]
            else:
                self.overlong += 1
                return
        if not supervised.any():
            self.unsupervised += 1
            self._first_unsupervised = self._first_unsupervised or place
            return
        self._kept.add((tokens, supervised))
        self._kinds.add(kind)

    def refuse(self, error: DataError, place: str) -> None:
        """Adds the error of a row that cannot be used; `data.malformed` may drop the row."""
        if isinstance(error, MalformedRowError) and self._config.malformed == "drop":
            self._dropped.add(place, error)
        else:
            self._problems.add(place, error)

    def note(self, what: str, place: str) -> None:
        """Counts a row with a change to report."""
        known = self._changes.get(what, Change(what, 0, place))
        self._changes[what] = known._replace(rows=known.rows + 1)

    @property
    def is_hopeless(self) -> bool:
        """Whether many rows were read and none of them can be used."""
        return self.read >= _TRIED and len(self._problems) == self.read

    def check(self, stopped: str = "") -> None:
        """Raises DataError if rows were lost without a setting that drops them, or all were lost.

        Args:
            stopped: Why the rest of the rows was not read.
        """
        config = self._config
        lost = 0
        more = []
        if self.overlong and config.overlong == "error":
            lost += self.overlong
            more.append(
                f"{self.overlong} of {self.read} rows are longer than data.max_seq_length: "
                f"{config.max_seq_length}; the first, {self._first_overlong}. Raise "
                "max_seq_length, or set data.overlong to truncate or drop"
            )
        if self.unsupervised and config.unsupervised == "error":
            lost += self.unsupervised
            more.append(
                f"{self.unsupervised} of {self.read} rows have no supervised token"
                f"{f' ({plural(self.truncated, "row")} truncated)' if self.truncated else ''}; the "
                f"first is {self._first_unsupervised}. Mend them, or set data.unsupervised: drop"
            )
        self._problems.check(self.read, stopped=stopped, lost=lost, more=more)
        if not len(self._kept):
            raise DataError(self._nothing_left())

    @property
    def _all_changes(self) -> tuple[Change, ...]:
        """All changes to rows; rows dropped as malformed by kind."""
        dropped = (
            Change(f"{_DROPPED}: {problem.message}", problem.rows, problem.places[0])
            for problem in self._dropped.kinds
        )
        return (*dropped, *self._changes.values())

    def _nothing_left(self) -> str:
        lost = [
            f"{self.overlong} are longer than data.max_seq_length: {self._config.max_seq_length}"
        ]
        lost = lost * bool(self.overlong)
        if self.unsupervised:
            lost.append(f"{self.unsupervised} have no supervised token")
        lost += [f"{change.rows} {change.what}" for change in self._all_changes]
        firsts = [self._first_overlong, self._first_unsupervised]
        firsts += [change.first for change in self._all_changes]
        first = next(filter(None, firsts), "")
        return f"none of {self.read} rows is left: {' and '.join(lost)}; the first, {first}"

    def report(self, sources: tuple[str, ...]) -> EncodeReport:
        """Returns the report; the caller adds formats and sources."""
        kinds: list[RowKind] = [kind for kind in ROW_KINDS if kind in self._kinds]
        return EncodeReport(
            format="",
            mask_source="",
            rows_read=self.read,
            rows_kept=len(self._kept),
            rows_truncated=self.truncated,
            rows_dropped_overlong=self.overlong if self._config.overlong == "drop" else 0,
            rows_dropped_unsupervised=self.unsupervised,
            tokens=self._kept.tokens,
            supervised_tokens=self._kept.supervised_tokens,
            sources=sources,
            kinds=tuple(kinds),
            changes=self._all_changes,
            unmet=tuple(n for n in self._config.ignore if tell_ignored(n) not in self._changes),
        )
