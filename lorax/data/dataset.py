"""Encoded rows: token ids, loss mask, and a report of their encoding."""

import array
import contextlib
import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Self

import numpy as np
from jaxtyping import Bool, Int32, Int64
from numpy.typing import ArrayLike

from lorax.data.reading.formats import RowKind
from lorax.data.reading.rows import DataError

type EncodedRow = tuple[Int32[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]
"""Token ids of a row, and its loss mask."""


class Change(NamedTuple):
    """A change to some rows: what changed, the number of rows, and the place of the first."""

    what: str
    rows: int
    first: str


def tell_ignored(name: str) -> str:
    """Returns the line about rows with keys that `data.ignore` names."""
    return f"hold {name}, which is not learned from (data.ignore)"


@dataclasses.dataclass(frozen=True)
class EncodeReport:
    """A report on the encoding of rows.

    Attributes:
        format: Format of the rows; several, joined by commas, if the sources differ.
        mask_source: The source of the loss mask: labels, all, completion, markers, generation or
            prefix; joined likewise.
        rows_read: Rows in the sources, after slicing.
        rows_kept: Rows in the dataset: more, where a row became several.
        rows_truncated: Rows cut to `max_seq_length`, whether kept or not.
        rows_dropped_overlong: Rows dropped because they are longer than `max_seq_length`.
        rows_dropped_unsupervised: Rows dropped because none of their tokens is supervised.
        tokens: Tokens of the rows kept.
        supervised_tokens: Prediction targets among them.
        sources: Paths and hub ids.
        changes: Other changes, such as rows dropped because they are malformed.
        date: The day given to the chat template, if it asks for one.
        unmet: Names of `data.ignore` that no row holds.
        stop_ids: Learned tokens that end a learned turn: a model trained on the rows stops with
            them.
        kinds: The kinds of the rows kept.
    """

    format: str
    mask_source: str
    rows_read: int
    rows_kept: int
    rows_truncated: int
    rows_dropped_overlong: int
    rows_dropped_unsupervised: int
    tokens: int
    supervised_tokens: int
    sources: tuple[str, ...]
    changes: tuple[Change, ...] = ()
    date: str | None = None
    unmet: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    kinds: tuple[RowKind, ...] = ()


@dataclasses.dataclass(frozen=True)
class EncodedDataset:
    """Rows of tokens, laid end to end.

    Attributes:
        tokens: Ids of all rows.
        supervised: Whether each token is a prediction target; never at the start of a row, where
            there is nothing to predict it from.
        offsets: Row ``i`` is ``tokens[offsets[i]:offsets[i + 1]]``.
        report: The report on the encoding.
    """

    tokens: Int32[np.ndarray, " tokens"]
    supervised: Bool[np.ndarray, " tokens"]
    offsets: Int64[np.ndarray, " rows+1"]
    report: EncodeReport

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[tuple[ArrayLike, ArrayLike]],
        report: EncodeReport | None = None,
    ) -> Self:
        """Builds a dataset from rows; the first token of a row is never supervised.

        Args:
            rows: Token ids and mask of each; at least one row, each with at least one token.
            report: Counts of the rows themselves if not given.

        Raises:
            DataError: If there is no row, an empty one, or one whose parts differ in length.
        """
        pairs = [(np.asarray(ids, np.int32), np.array(mask, np.bool_)) for ids, mask in rows]
        if not pairs:
            raise DataError("a dataset needs at least one row, got none")
        for index, (ids, mask) in enumerate(pairs):
            if ids.ndim != 1 or not len(ids) or ids.shape != mask.shape:
                raise DataError(
                    f"row {index} needs as many mask entries as token ids, at least one, got "
                    f"shapes {ids.shape} and {mask.shape}"
                )
            mask[0] = False
        tokens = np.concatenate([ids for ids, _ in pairs])
        supervised = np.concatenate([mask for _, mask in pairs])
        offsets = np.cumsum([0, *(len(ids) for ids, _ in pairs)], dtype=np.int64)
        return cls(tokens, supervised, offsets, report or _count(tokens, supervised, len(pairs)))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @functools.cached_property
    def targets(self) -> Int64[np.ndarray, " rows"]:
        """Supervised tokens of each row."""
        # Row by row: `np.add.reduceat` would widen every flag of the dataset to eight bytes.
        rows = (self.supervised[a:b] for a, b in itertools.pairwise(self.offsets))
        return np.fromiter(map(np.count_nonzero, rows), np.int64, len(self))

    @property
    def lengths(self) -> Int64[np.ndarray, " rows"]:
        """Tokens of each row."""
        return np.diff(self.offsets)

    def row(self, index: int) -> EncodedRow:
        """Returns row `index`, counted from 0, as views."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a dataset with {len(self)} rows")
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[part], self.supervised[part]


class RowWriter(contextlib.AbstractContextManager["RowWriter"]):
    """Writes rows end to end to nameless files, so that a dataset may exceed the memory.

    The files are in the folder for temporary files (TMPDIR; in memory if that is) and disappear
    with the dataset.
    """

    def __init__(self):
        def open_file():
            return tempfile.TemporaryFile(prefix="lorax-data-", buffering=2**20)

        with self._telling(), contextlib.ExitStack() as stack:
            self._tokens = stack.enter_context(open_file())
            self._supervised = stack.enter_context(open_file())
            self._files = stack.pop_all()
        self._ends = array.array("q", [0])
        self.supervised_tokens = 0

    def __len__(self) -> int:
        return len(self._ends) - 1

    @property
    def tokens(self) -> int:
        """Tokens written so far."""
        return self._ends[-1]

    def add(self, row: EncodedRow) -> None:
        """Writes the next row.

        Raises:
            DataError: If there is no room for it.
        """
        tokens, supervised = row
        with self._telling():
            self._tokens.write(tokens.astype(np.int32, copy=False).tobytes())
            self._supervised.write(supervised.tobytes())
        self._ends.append(self.tokens + len(tokens))
        self.supervised_tokens += int(supervised.sum())

    def finish(self, report: EncodeReport) -> EncodedDataset:
        """Returns the rows written, at least one: mapped into memory, not read into it."""
        with self._telling():
            self._tokens.flush()
            self._supervised.flush()
        tokens = np.memmap(self._tokens, np.int32, mode="r")
        supervised = np.memmap(self._supervised, np.bool_, mode="r")
        offsets = np.asarray(self._ends, np.int64)
        return EncodedDataset(np.asarray(tokens), np.asarray(supervised), offsets, report)

    def __exit__(self, *_: object) -> None:
        # The unwritten rest after an error must not raise another.
        with contextlib.suppress(OSError):
            self._files.close()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{tempfile.gettempdir()}: cannot hold the encoded rows: {error.strerror}; make "
                "room, or set TMPDIR to a folder on another disk"
            ) from error


def _count(
    tokens: Int32[np.ndarray, " tokens"], supervised: Bool[np.ndarray, " tokens"], rows: int
) -> EncodeReport:
    return EncodeReport(
        format="tokenized",
        mask_source="labels",
        rows_read=rows,
        rows_kept=rows,
        rows_truncated=0,
        rows_dropped_overlong=0,
        rows_dropped_unsupervised=0,
        tokens=len(tokens),
        supervised_tokens=int(supervised.sum()),
        sources=(),
        kinds=("tokens",),
    )
