"""Batches: the rows of each step, as arrays."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64

from lorax.data.dataset import EncodedDataset
from lorax.data.packing import pack_rows
from lorax.data.reading.formats import IGNORED_LABEL

type Batch = dict[str, np.ndarray]
"""input_ids, labels, positions and, if packed, segment_ids: int32 (micro_batches, rows, width)."""

_WIDTH_UNIT = 128
_MAX_WIDTHS = 5


class Batches:
    """The steps of every epoch over a dataset.

    A step is a window of ``micro_batches × rows_per_micro_batch`` batch rows: dataset rows or,
    with packing, bins of several. Each is in exactly one window of an epoch; empty rows fill the
    last window. The order is a function of seed and epoch alone.

    Labels are shifted already: ``labels[t]`` is token ``t + 1`` of the same document if that is
    supervised and -100 otherwise. On padding all ids and positions are 0 and labels -100.

    Args:
        dataset: The rows.
        rows_per_micro_batch: Batch rows over all devices.
        micro_batches: Micro-batches of one optimizer step.
        packing: Packs rows into bins of `max_seq_length`; adds ``segment_ids``, which count the
            documents of a bin from 1 and are 0 on padding; positions restart in each document.
        max_seq_length: Longest batch row.
        seed: Seed of the order.
        shuffle: A new order in each epoch; without it, that of the dataset.

    Raises:
        ValueError: If a count is not positive or a row is longer than `max_seq_length`.
    """

    def __init__(
        self,
        dataset: EncodedDataset,
        *,
        rows_per_micro_batch: int,
        micro_batches: int,
        packing: bool,
        max_seq_length: int,
        seed: int,
        shuffle: bool,
    ) -> None:
        for name, count in (
            ("rows_per_micro_batch", rows_per_micro_batch),
            ("micro_batches", micro_batches),
        ):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        lengths = dataset.lengths
        if not len(lengths) or int(lengths.min()) < 1:
            raise ValueError("the dataset needs at least one row, and a token in each")
        if int(lengths.max()) > max_seq_length:
            raise ValueError(
                f"row {int(lengths.argmax())} of the dataset has {int(lengths.max())} tokens, more "
                f"than max_seq_length = {max_seq_length}"
            )
        self.dataset = dataset
        self.rows_per_micro_batch = rows_per_micro_batch
        self.micro_batches = micro_batches
        self.packing = packing
        self.seed = seed
        self.shuffle = shuffle
        bins = pack_rows(lengths, max_seq_length) if packing else None
        self._members = np.arange(len(dataset)) if bins is None else np.concatenate(bins)
        sizes = np.ones_like(lengths) if bins is None else np.asarray([len(rows) for rows in bins])
        self._first = np.concatenate([[0], np.cumsum(sizes)])  # of each bin, in `_members`
        self._bin_tokens = np.add.reduceat(lengths[self._members], self._first[:-1])
        self._bin_targets = np.add.reduceat(dataset.targets[self._members], self._first[:-1])
        self._starts = _starts_in_bin(lengths[self._members], sizes)
        self._longest = int(lengths.max())
        self.widths = width_ladder(int(self._bin_tokens.max()))

    @property
    def steps_per_epoch(self) -> int:
        """Windows of an epoch, the last one filled up."""
        return -(-len(self._bin_tokens) // self._window)

    def document_window(self) -> tuple[int, int]:
        """Returns a width that no document exceeds, and the most that begin in one such window.

        The width is ``128·2^i``; windows are counted from the start of each packed row.
        """
        window = _WIDTH_UNIT
        while window < self._longest:
            window *= 2
        bins = np.repeat(np.arange(len(self._bin_tokens)), np.diff(self._first))
        windows = bins * (1 + int(self._bin_tokens.max()) // window) + self._starts // window
        return window, int(np.bincount(windows).max())

    def step_shapes(self, epoch: int) -> list[int]:
        """Returns the width of each step of an epoch."""
        longest = self._windows(epoch, self._bin_tokens).max(axis=1)
        return [self.widths[i] for i in np.searchsorted(self.widths, longest)]

    def supervised_tokens(self, epoch: int) -> Int64[np.ndarray, " steps"]:
        """Returns the number of labels that are not -100 in each step of an epoch."""
        return self._windows(epoch, self._bin_targets).sum(axis=1)

    def tokens(self, epoch: int) -> Int64[np.ndarray, " steps"]:
        """Returns the number of tokens, without padding, in each step of an epoch."""
        return self._windows(epoch, self._bin_tokens).sum(axis=1)

    def rows(self, epoch: int, step: int) -> list[list[int]]:
        """Returns the dataset rows in each micro-batch of a step of an epoch, both from 0."""
        window = self._order(epoch)[step * self._window : (step + 1) * self._window]
        size = self.rows_per_micro_batch
        return [
            [row for index in window[i * size : (i + 1) * size] for row in self._bin(index)]
            for i in range(self.micro_batches)
        ]

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yields the batches of an epoch from `start_step` on, each built when asked for.

        Raises:
            ValueError: If `start_step` is negative or beyond the end of the epoch.
        """
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step must be in [0, {self.steps_per_epoch}], got {start_step}")
        order = self._order(epoch)
        widths = self.step_shapes(epoch)
        return (
            self._build(order[step * self._window : (step + 1) * self._window], widths[step])
            for step in range(start_step, self.steps_per_epoch)
        )

    @property
    def _window(self) -> int:
        return self.rows_per_micro_batch * self.micro_batches

    def _bin(self, index: int) -> list[int]:
        """Returns the dataset rows of a bin."""
        return self._members[self._first[index] : self._first[index + 1]].tolist()

    def _order(self, epoch: int) -> Int64[np.ndarray, " bins"]:
        if not self.shuffle:
            return np.arange(len(self._bin_tokens))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self._bin_tokens))

    def _windows(
        self, epoch: int, values: Int64[np.ndarray, " bins"]
    ) -> Int64[np.ndarray, "steps window"]:
        """Returns a value of each bin, laid out by step; 0 for empty rows."""
        padded = np.zeros(self.steps_per_epoch * self._window, np.int64)
        padded[: len(values)] = values[self._order(epoch)]
        return padded.reshape(self.steps_per_epoch, self._window)

    def _build(self, window: Int64[np.ndarray, " bins"], width: int) -> Batch:
        names = ["input_ids", "labels", "positions"] + ["segment_ids"] * self.packing
        flat = {name: np.zeros((self._window, width), np.int32) for name in names}
        flat["labels"].fill(IGNORED_LABEL)
        for line, index in enumerate(window):
            start = 0
            for document, row in enumerate(self._bin(index), start=1):
                tokens, supervised = self.dataset.row(row)
                end = start + len(tokens)
                flat["input_ids"][line, start:end] = tokens
                flat["labels"][line, start : end - 1] = np.where(
                    supervised[1:], tokens[1:], IGNORED_LABEL
                )
                flat["positions"][line, start:end] = np.arange(len(tokens))
                if self.packing:
                    flat["segment_ids"][line, start:end] = document
                start = end
        shape = (self.micro_batches, self.rows_per_micro_batch, width)
        return {name: array.reshape(shape) for name, array in flat.items()}


def width_ladder(longest: int) -> list[int]:
    """Returns at most five widths, ``128·2^i`` below the longest row and one that just holds it.

    Few widths, because each costs a compilation of the step.
    """
    top = -(-longest // _WIDTH_UNIT) * _WIDTH_UNIT
    widths = [top]
    width = _WIDTH_UNIT
    below: list[int] = []
    while width < top:
        below.append(width)
        width *= 2
    return below[-(_MAX_WIDTHS - 1) :] + widths


def _starts_in_bin(
    lengths: Int64[np.ndarray, " rows"], sizes: Int64[np.ndarray, " bins"]
) -> Int64[np.ndarray, " rows"]:
    """Returns where each document begins in its bin, in the order of the bins."""
    ends = np.cumsum(lengths)
    before = np.concatenate([[0], ends])[np.cumsum(sizes) - sizes]
    return ends - lengths - np.repeat(before, sizes)
