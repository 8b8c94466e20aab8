"""Encoding sources of any format as token ids and a loss mask."""

import contextlib
import dataclasses
import datetime
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lorax.config.data import DataConfig, DataSource
from lorax.data.chat.masks import StopTokens, mask_labels, mask_plain, mask_turns
from lorax.data.chat.renderer import MOST_LIMITS, LimitError, TemplateError
from lorax.data.chat.template import load_chat_template
from lorax.data.chat.tokenizer import TokenizedText, Tokenizer, check_fast, tokenize_in_parts
from lorax.data.chat.turns import RenderedText
from lorax.data.dataset import EncodedDataset, EncodedRow, RowWriter, tell_ignored
from lorax.data.reading.columns import detect_format, fitting_formats, read_flag, refuse_unread
from lorax.data.reading.conversation import Conversation
from lorax.data.reading.formats import (
    Completion,
    Document,
    Example,
    RowKind,
    TokenRow,
    kind_of,
    read_example,
)
from lorax.data.reading.rows import DataError, MalformedRowError, Row, RowError, Rows
from lorax.data.reading.sources import open_source, sources_of
from lorax.data.sieve import Sieve
from lorax.system.arguments import check_kind
from lorax.system.wording import explain

_ROWS_PER_BATCH = 256
_SIZE_PER_BATCH = 2**20
_DEEPEST = 100
_MESSAGE_COLUMNS = ("messages", "conversations", "prompt", "completion")


def load_encoded_dataset(
    sources: Sequence[DataSource | str] | str,
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    vocab_size: int | None = None,
) -> EncodedDataset:
    """Reads and encodes all rows of all sources, in order.

    Args:
        sources: `config.train` or `config.eval`; or a path, or several.
        config: The data settings: format, supervision, rows that do not fit.
        tokenizer: A fast one, unless all rows are tokenized already.
        vocab_size: Rows of the model's embedding; a token id beyond them is refused.

    Returns:
        The rows kept, each with at least one supervised token and at most `max_seq_length` tokens.

    Raises:
        TypeError: If an argument is of another kind.
        DataError: Naming the setting that cannot be used; or all rows with problems: each kind
            once, with its count, the file and line (or row) of the first, and the remedy.
    """
    check_kind("config", config, DataConfig, "a lorax.DataConfig, such as config.data")
    if isinstance(tokenizer, str | Path):
        raise TypeError(f"tokenizer must be one: pass lorax.load_tokenizer({str(tokenizer)!r})")
    opened = sources_of(sources)
    with RowWriter() as kept:
        sieve = Sieve(config, kept)
        encoder = _RowEncoder(config, tokenizer, vocab_size, sieve)
        for source in opened:
            try:
                with open_source(source) as rows:
                    encoder.encode(rows)
            except OSError as error:
                raise DataError(f"{source.path}: cannot be read: {explain(error)}") from error
        sieve.check()
        report = dataclasses.replace(
            sieve.report(tuple(source.path for source in opened)),
            format=", ".join(sorted(encoder.formats)),
            mask_source=", ".join(sorted(encoder.mask_sources)),
            date=encoder.date,
            stop_ids=tuple(sorted(encoder.stops.learned)),
        )
        return kept.finish(report)


class _RowEncoder:
    """Encodes the rows of sources into a sieve; collects the formats and mask sources met.

    Attributes:
        formats: The formats of the rows.
        mask_sources: The sources of the loss masks.
        date: The day given to a chat template; None if none asked.
        stops: The stop tokens, and the learned ones among them.
    """

    def __init__(
        self, config: DataConfig, tokenizer: Tokenizer, vocab_size: int | None, sieve: Sieve
    ) -> None:
        if config.loss_on == "all" and config.response_part is not None:
            raise DataError(
                "data.instruction_part and data.response_part have no effect with data.loss_on: "
                "all; remove them or change loss_on"
            )
        # Read once: a template must not see two days if midnight passes.
        day = config.date or datetime.date.today().isoformat()
        self.formats: set[str] = set()
        self.mask_sources: set[str] = set()
        self.date: str | None = None
        self._config = config.model_copy(update={"date": day})
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._chat = load_chat_template(tokenizer, self._config)
        self.stops = StopTokens.of(tokenizer, config.train_on_eos)
        self._sieve = sieve
        self._limits = 0

    def encode(self, rows: Rows) -> None:
        """Encodes all rows of a source.

        Raises:
            DataError: If a setting cannot be used; or at once, if no row of very many can be.
        """
        data_format = self._config.format
        for batch in _batches(rows):
            examples: list[tuple[int, Example]] = []
            if data_format == "auto":
                data_format = self._detect(batch, rows)
            for index, row in batch:
                self._sieve.read += 1
                example = None
                with self._refusing(rows, index):
                    if isinstance(row, MalformedRowError):
                        raise row
                    row = self._without_ignored(row, rows.place(index))
                    self.formats.add(data_format)
                    example = self._read(row, data_format, rows.place(index))
                with self._refusing(rows, index):  # reported even where the row is also malformed
                    if isinstance(row, dict):
                        refuse_unread(row, data_format)
                    if example is not None:
                        examples.append((index, example))
            self._encode(examples, rows)
            if self._limits >= MOST_LIMITS:
                self._sieve.check("; reading stopped where the template had taken too much")
            if self._sieve.is_hopeless:
                self._sieve.check("; reading stopped there")

    def _detect(self, batch: Sequence[tuple[int, Row | MalformedRowError]], rows: Rows) -> str:
        """Returns the format of the first row that fits one; "auto" if no row can be parsed.

        Raises:
            DataError: If rows can be parsed and none fits a format, or the first fits several.
        """
        ignored = set(self._config.ignore)
        found = [(i, row.keys() - ignored) for i, row in batch if isinstance(row, dict)]
        if not found:
            return "auto"
        fitting = (pair for pair in found if fitting_formats(pair[1]))
        index, columns = next(fitting, next((pair for pair in found if pair[1]), found[0]))
        with self._refusing(rows, index):
            return detect_format(columns)
        return "auto"

    def _without_ignored(self, row: Row, place: str) -> Row:
        """Returns a row without the keys that `data.ignore` names, and counts it."""
        ignored = set(self._config.ignore)
        if not ignored:
            return row
        met = ignored & row.keys()
        row = {key: value for key, value in row.items() if key not in met}
        keys = {name.removeprefix("message.") for name in ignored if name.startswith("message.")}
        for column in _MESSAGE_COLUMNS if keys else ():
            if isinstance(messages := row.get(column), list):
                dicts = [message for message in messages if isinstance(message, dict)]
                met |= {f"message.{key}" for message in dicts for key in keys & message.keys()}
                row[column] = [
                    {key: value for key, value in message.items() if key not in keys}
                    if isinstance(message, dict)
                    else message
                    for message in messages
                ]
        for name in sorted(met):
            self._sieve.note(tell_ignored(name), place)
        return row

    def _read(self, row: Row, data_format: str, place: str) -> Example | None:
        """Returns the example in a row; None if it is left out, which is counted."""
        example = read_example(row, data_format, chat=self._chat is not None)
        if read_flag(row, "") is False:
            self._sieve.note("left out by a flag of the row", place)
            return None
        if not isinstance(example, Conversation):
            self._refuse_chat_settings(data_format)
            return example
        if self._chat is None:
            raise DataError(
                "the row is a conversation and the tokenizer has no chat template; set "
                "data.chat_template to the path of a .jinja file"
            )
        if self._chat.asks_for_date(example):  # its error is about this row
            self.date = self._config.date
        leading = self._config.leading_answer
        if leading != "error" and example.has_leading_answer:
            action = (
                "dropped, begun" if leading == "drop" else "cut to their first user turn, begun"
            )
            self._sieve.note(f"{action} by an answer (data.leading_answer: {leading})", place)
            if leading == "drop":
                return None
            example = example.without_leading_answer()
        return self._apply_flags(example, place)

    def _apply_flags(self, example: Conversation, place: str) -> Example | None:
        """Returns a conversation with its own flags applied; None if none of it is learned."""
        loss_on = self._config.loss_on
        for index, flag in sorted(example.flags.items()):
            role = example.messages[index]["role"]
            if loss_on == "all" and not flag:
                raise RowError(
                    f"messages[{index}] ({role}) has a flag against learning, and data.loss_on: "
                    "all learns every turn; set data.loss_on: assistant, or remove the flag"
                )
            if loss_on != "all" and flag and role != "assistant":
                raise RowError(
                    f"messages[{index}] ({role}) has a flag for learning, and data.loss_on: "
                    f"{loss_on} learns assistant turns alone; set the flag to 0, or remove it"
                )
        learned = set(example.learned_replies(loss_on))
        if loss_on != "all" and any(
            example.flags.get(index, False) and index not in learned for index in example.replies
        ):
            self._sieve.note(
                "hold assistant turns with a flag for learning that are not learned: "
                "data.loss_on, or the row's completion, leaves them out",
                place,
            )
        if any(not example.flags.get(index, True) for index in example.replies):
            self._sieve.note(
                "hold assistant turns that a flag leaves out of what is learned", place
            )
        if loss_on != "all" and not learned:
            self._sieve.note("left out, since flags leave nothing of them to learn", place)
            return None
        return example

    def _encode(self, examples: Sequence[tuple[int, Example]], rows: Rows) -> None:
        """Encodes the examples of rows, and passes them to the sieve."""
        kinds: dict[int, RowKind] = {index: kind_of(example) for index, example in examples}
        talks = [example for _, example in examples if isinstance(example, Conversation)]
        rendered = self._chat.render(talks) if self._chat is not None else iter(())
        read: list[tuple[int, RenderedText | TokenRow]] = []
        for index, example in examples:
            with self._refusing(rows, index):
                if isinstance(example, Conversation):
                    found = next(rendered)
                    if isinstance(found, RowError):
                        raise found
                else:
                    found = [self._read_plain(example)]
                read += [(index, item) for item in found]
        tokenized = self._tokenize([item for _, item in read if isinstance(item, RenderedText)])
        for index, parts in itertools.groupby(read, lambda pair: pair[0]):
            items = [item for _, item in parts]
            texts = [next(tokenized) if isinstance(item, RenderedText) else None for item in items]
            with self._refusing(rows, index):
                encoded = [self._mask(*pair) for pair in zip(items, texts, strict=True)]
                for item, row in zip(items, encoded, strict=True):
                    self._sieve.add(row, rows.place(index), kinds[index])
                    for note in item.notes if isinstance(item, RenderedText) else ():
                        self._sieve.note(note, rows.place(index))

    @contextlib.contextmanager
    def _refusing(self, rows: Rows, index: int) -> Iterator[None]:
        """Passes the error of a row to the sieve; names the row if the error concerns all rows."""
        try:
            yield
        except RowError as error:
            self._limits += isinstance(error, LimitError)
            self._sieve.refuse(error, rows.place(index))
        except TemplateError as error:
            own = self._config.chat_template
            which = "the tokenizer's chat template" if own == "tokenizer" else own
            remedy = (
                "fix the template, or set data.chat_template to a .jinja file that can be parsed"
            )
            raise DataError(f"{which}: {error}; {remedy}") from error
        except DataError as error:
            raise DataError(f"{rows.place(index)}: {error}") from error

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
                f"a row of {what} has no part to learn that differs from the rest, so "
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
            plain: tokenize_in_parts(
                self._tokenizer,
                [item.text for item in texts if item.plain == plain],
                add_special_tokens=plain,
            )
            for plain in (False, True)
        }
        return (next(kinds[item.plain]) for item in texts)

    def _mask(self, item: RenderedText | TokenRow, tokenized: TokenizedText | None) -> EncodedRow:
        if isinstance(item, TokenRow):
            self.mask_sources.add("labels")
            tokens, supervised = mask_labels(item, self.stops)
        else:
            assert tokenized is not None
            if lost := tokenized.find_lost(item.text):
                # Where it drops characters, its offsets of the others are wrong too.
                raise RowError(
                    "the tokenizer gives no token for some characters, and it has no unk_token for "
                    f"them: {len(lost):,} are missing at the end of its {len(item.text):,}; use "
                    "the tokenizer of the model as it came"
                )
            self.mask_sources.add(item.mask_source)
            mask = mask_plain if item.plain else mask_turns
            tokens, supervised = mask(tokenized, item, self.stops)
        lowest = int(tokens.min(initial=0))
        highest = int(tokens.max(initial=0))
        if lowest < 0 or (self._vocab_size is not None and highest >= self._vocab_size):
            size = "any vocabulary" if lowest < 0 else f"a vocabulary of {self._vocab_size}"
            raise RowError(
                f"token id {lowest if lowest < 0 else highest} is outside of {size}; use the "
                "tokenizer of the model"
            )
        supervised[:1] = False
        return tokens, supervised


def _batches(rows: Rows) -> Iterator[list[tuple[int, Row | MalformedRowError]]]:
    """Yields chunks of rows with their indices: many short ones or few long ones."""
    batch: list[tuple[int, Row | MalformedRowError]] = []
    size = 0
    for index, row in enumerate(rows):
        try:
            size += _size(row)
        except MalformedRowError as error:
            row = error
        batch.append((index, row))
        if len(batch) == _ROWS_PER_BATCH or size >= _SIZE_PER_BATCH:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def _size(row: Any) -> int:
    """Returns about how many characters a row has as JSON."""
    size = 0
    level = [row]
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
    raise MalformedRowError(f"the row is nested more than {_DEEPEST} deep")
