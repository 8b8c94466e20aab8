"""Sources of any format encoded as token ids and a mask of what is supervised."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lorax.config import DataConfig, DataSource
from lorax.data.chat import RenderedText, load_chat_template
from lorax.data.dataset import EncodedDataset, EncodedRow, EncodeReport, RowWriter
from lorax.data.formats import (
    IGNORED_LABEL,
    Completion,
    Conversation,
    Document,
    Example,
    TokenRow,
    detect_format,
    read_example,
)
from lorax.data.masks import StopTokens, mask_plain, mask_turns, note_label_stops
from lorax.data.rows import DataError, Row, Rows, check_unicode
from lorax.data.sources import open_source
from lorax.data.tokenizer import TokenizedText, Tokenizer, check_fast, tokenize_texts

_ROWS_PER_BATCH, _SIZE_PER_BATCH = 256, 2**20
_DEEPEST = 100


def load_encoded_dataset(
    sources: Sequence[DataSource],
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    vocab_size: int | None = None,
) -> EncodedDataset:
    """Reads and encodes all rows of all sources, in order.

    Args:
        sources: `config.train` or `config.eval`.
        config: The format, what is supervised, and what happens to rows that do not fit.
        tokenizer: A fast one, unless all rows are tokenized already.
        vocab_size: Rows of the model's embedding; a token id outside of them is refused.

    Returns:
        The rows kept, each with at least one supervised token and at most `max_seq_length` tokens.

    Raises:
        DataError: Naming the file and line (or row) that cannot be used, or the setting, and why.
    """
    if not sources:
        raise DataError("a dataset needs at least one source, got none")
    encoder = _RowEncoder(config, tokenizer, vocab_size)
    with RowWriter() as kept:
        sieve = _Sieve(config, kept)
        for source in sources:
            with open_source(source) as rows:
                for index, encoded in encoder.encode(rows):
                    sieve.add(encoded, rows, index)
        sieve.check()
        report = EncodeReport(
            format=", ".join(sorted(encoder.formats)),
            mask_source=", ".join(sorted(encoder.mask_sources)),
            rows_read=sieve.read,
            rows_kept=len(kept),
            rows_truncated=sieve.truncated,
            rows_dropped_overlong=sieve.overlong if config.overlong == "drop" else 0,
            rows_dropped_unsupervised=sieve.unsupervised,
            tokens=kept.tokens,
            supervised_tokens=kept.supervised_tokens,
            sources=tuple(source.path for source in sources),
            stop_ids=tuple(sorted(encoder.stops.learned)),
        )
        return kept.finish(report)


class _RowEncoder:
    """Encodes the rows of sources; collects the formats, mask sources and stop tokens met."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, vocab_size: int | None) -> None:
        if config.loss_on == "all" and config.response_part is not None:
            raise DataError(
                "data.instruction_part and data.response_part have no effect with data.loss_on: "
                "all; remove them or change loss_on"
            )
        self.formats: set[str] = set()
        self.mask_sources: set[str] = set()
        self._config = config
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._chat = load_chat_template(tokenizer, config)
        self.stops = StopTokens.of(tokenizer, config.train_on_eos)

    def encode(self, rows: Rows) -> Iterator[tuple[int, EncodedRow]]:
        """Yields the index of each row with its token ids and mask, of any length."""
        data_format = self._config.format
        for batch in _batches(rows):
            if data_format == "auto":
                with _named(rows, 0):
                    data_format = detect_format(batch[0][1])
            self.formats.add(data_format)
            examples: list[Example] = []
            for index, row in batch:
                with _named(rows, index):
                    examples.append(self._read(row, data_format))
            rendered, read = self._render(examples, data_format), []
            for index, _ in batch:
                with _named(rows, index):
                    read.append(next(rendered))
            tokenized = self._tokenize([item for item in read if isinstance(item, RenderedText)])
            for (index, _), item in zip(batch, read, strict=True):
                with _named(rows, index):
                    encoded = self._mask(item, tokenized)
                yield index, encoded

    def _read(self, row: Row, data_format: str) -> Example:
        example = read_example(row, data_format, chat=self._chat is not None)
        if isinstance(example, Conversation):
            if self._chat is None:
                raise DataError(
                    "the row is a conversation and the tokenizer has no chat template; set "
                    "data.chat_template to the path of a .jinja file"
                )
            self._chat.template_of(example)  # what it raises is about this row
        return example

    def _render(
        self, examples: list[Example], data_format: str
    ) -> Iterator[RenderedText | TokenRow]:
        """Yields the text of each example, conversations rendered; raises errors in their turn."""
        talks = [example for example in examples if isinstance(example, Conversation)]
        rendered = self._chat.render(talks) if self._chat is not None else iter(())
        for example in examples:
            if isinstance(example, Conversation):
                item = next(rendered)
                check_unicode(item.text, "the rendered conversation")
            else:
                self._refuse_chat_settings(data_format)
                item = self._read_plain(example)
            self.mask_sources.add(item.mask_source if isinstance(item, RenderedText) else "labels")
            yield item

    def _read_plain(self, example: Completion | Document | TokenRow) -> RenderedText | TokenRow:
        loss_on = self._config.loss_on
        if isinstance(example, Completion):
            text = example.prompt + example.completion
            if loss_on == "all":
                return RenderedText(text, ((0, len(text)),), "all", plain=True)
            return RenderedText(text, ((len(example.prompt), len(text)),), "completion", plain=True)
        if loss_on != "all" and (isinstance(example, Document) or example.labels is None):
            what = "text" if isinstance(example, Document) else "input_ids without labels"
            raise DataError(
                f"a row of {what} has no part to learn that could be told from the rest, so "
                f"data.loss_on: {loss_on} cannot apply; set data.loss_on: all"
            )
        if isinstance(example, Document):
            return RenderedText(example.text, ((0, len(example.text)),), "all", plain=True)
        return example

    def _refuse_chat_settings(self, data_format: str) -> None:
        for key in ("response_part", "chat_template"):
            if getattr(self._config, key) not in (None, "tokenizer"):
                raise DataError(
                    f"data.{key} is for conversations, and this row of format {data_format!r} is "
                    "none: remove it, or write the row as messages"
                )

    def _tokenize(self, texts: list[RenderedText]) -> Iterator[TokenizedText]:
        if texts:
            check_fast(self._tokenizer)
        kinds = {
            plain: iter(
                tokenize_texts(
                    self._tokenizer,
                    [item.text for item in texts if item.plain == plain],
                    add_special_tokens=plain,
                )
            )
            for plain in (False, True)
        }
        return (next(kinds[item.plain]) for item in texts)

    def _mask(
        self, item: RenderedText | TokenRow, tokenized: Iterator[TokenizedText]
    ) -> EncodedRow:
        if isinstance(item, TokenRow):
            tokens, supervised = _mask_labels(item)
            note_label_stops((tokens, supervised), self.stops)
        else:
            mask = mask_plain if item.plain else mask_turns
            tokens, supervised = mask(next(tokenized), item, self.stops)
        lowest, highest = int(tokens.min(initial=0)), int(tokens.max(initial=0))
        if lowest < 0 or (self._vocab_size is not None and highest >= self._vocab_size):
            size = "any vocabulary" if lowest < 0 else f"a vocabulary of {self._vocab_size}"
            raise DataError(
                f"token id {lowest if lowest < 0 else highest} is outside of {size}; use the "
                "tokenizer of the model"
            )
        supervised[:1] = False
        return tokens, supervised


class _Sieve:
    """Keeps the rows that can be trained on and counts those that cannot."""

    def __init__(self, config: DataConfig, kept: RowWriter) -> None:
        self._kept = kept
        self.read = self.truncated = self.overlong = self.unsupervised = 0
        self._config = config
        self._first_overlong = self._first_unsupervised = ""

    def add(self, encoded: EncodedRow, rows: Rows, index: int) -> None:
        """Takes the next row, cutting or dropping it as the config says."""
        tokens, supervised = encoded
        limit = self._config.max_seq_length
        self.read += 1
        if len(tokens) > limit:
            self._first_overlong = (
                self._first_overlong or f"{rows.place(index)} has {len(tokens)} tokens"
            )
            if self._config.overlong == "truncate":
                self.truncated += 1
                tokens, supervised = tokens[:limit], supervised[:limit]
            else:
                self.overlong += 1
                return
        if not supervised.any():
            self.unsupervised += 1
            self._first_unsupervised = self._first_unsupervised or rows.place(index)
            return
        self._kept.add((tokens, supervised))

    def check(self) -> None:
        """Raises DataError if rows were lost that the config does not give up, or all were."""
        config = self._config
        if self.overlong and config.overlong == "error":
            raise DataError(
                f"{self.overlong} of {self.read} rows are longer than data.max_seq_length: "
                f"{config.max_seq_length}; the first, {self._first_overlong}. Raise "
                "max_seq_length, or set data.overlong to truncate or drop"
            )
        if self.unsupervised and config.unsupervised == "error":
            raise DataError(
                f"{self.unsupervised} of {self.read} rows have no supervised token"
                f"{f' ({self.truncated} rows were truncated)' if self.truncated else ''}; the "
                f"first is {self._first_unsupervised}. Mend them, or set data.unsupervised: drop"
            )
        if not len(self._kept):
            raise DataError(
                f"none of {self.read} rows is left: {self.overlong} are longer than "
                f"data.max_seq_length: {config.max_seq_length} and {self.unsupervised} have no "
                f"supervised token; the first, {self._first_overlong or self._first_unsupervised}"
            )


def _batches(rows: Rows) -> Iterator[list[tuple[int, Row]]]:
    """Yields rows with their indices: many short ones or few long ones at a time."""
    batch: list[tuple[int, Row]] = []
    size = 0
    for index, row in enumerate(rows):
        batch.append((index, row))
        with _named(rows, index):
            size += _size(row)
        if len(batch) == _ROWS_PER_BATCH or size >= _SIZE_PER_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _size(row: Any) -> int:
    """Returns about how many characters a row has as JSON."""
    size, level = 0, [row]
    for _ in range(_DEEPEST):
        inner = []
        for value in level:
            match value:
                case str():
                    size += len(value)
                case dict():
                    inner.extend(value.values())
                case list() if value and isinstance(value[0], int):
                    size += 4 * len(value)
                case list():
                    inner.extend(value)
                case _:
                    size += 4
        if not inner:
            return size
        level = inner
    raise DataError(f"the row is nested more than {_DEEPEST} deep")


def _mask_labels(row: TokenRow) -> EncodedRow:
    try:
        tokens = np.asarray(row.tokens, np.int32)
    except OverflowError as error:
        raise DataError(f"input_ids holds a number that is no token id: {error}") from error
    if row.labels is None:
        return tokens, np.ones(len(tokens), np.bool_)
    return tokens, np.asarray([label != IGNORED_LABEL for label in row.labels], np.bool_)


@contextlib.contextmanager
def _named(rows: Rows, index: int) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"{rows.place(index)}: {error}") from error
