"""What a run is made of."""

import dataclasses
from pathlib import Path
from typing import Any

from lorax.config.run import RunConfig
from lorax.data.chat.renderer import RENDERER
from lorax.data.chat.template import read_own_template
from lorax.data.chat.tokenizer import load_tokenizer
from lorax.data.dataset import EncodedDataset
from lorax.data.encode import load_encoded_dataset
from lorax.data.reading.rows import SourceError
from lorax.interop.adapter_base import with_recorded_revision
from lorax.interop.adapter_tokenizer import tokenizer_files
from lorax.interop.folder import resolve_base
from lorax.interop.load import load_hf_config
from lorax.interop.peft_config import adapter_notes
from lorax.interop.stop_tokens import stop_token_ids
from lorax.models.decoder import CausalLM
from lorax.runs.memory import choose_recomputation
from lorax.runs.model import adapt_base, load_base

CHATS = ("auto", "messages", "sharegpt", "alpaca")
"""Formats of data whose rows a chat template renders, or may render."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Everything a run reads but the weights.

    Attributes:
        base: Folder of the base checkpoint's configuration and tokenizer.
        tokenizer: Its tokenizer.
        train: Encoded rows to learn from.
        eval: Encoded held-out rows.
        chat_template: Text of the run's own template; None where it is the tokenizer's.
        date: The day that the chat template was told, if it asks for it.
    """

    base: Path
    tokenizer: Any
    train: EncodedDataset
    eval: EncodedDataset | None
    chat_template: str | None
    date: str | None = None

    @property
    def datasets(self) -> dict[str, EncodedDataset]:
        """The data by name, training data first."""
        return {"train": self.train} | ({} if self.eval is None else {"eval": self.eval})

    @property
    def context(self) -> int:
        """Tokens of a row that the base model was made for."""
        return load_hf_config(self.base).context

    def stop_ids(self, *, needed: bool = True) -> tuple[int, ...]:
        """Returns what the trained model stops with; see `stop_token_ids`."""
        trained = self.train.report.stop_ids
        return stop_token_ids(self.base, self.tokenizer, trained, needed=needed)


def load_inputs(config: RunConfig) -> Inputs:
    """Reads the tokenizer and the data of a run.

    Raises:
        ValueError: Naming the file, the line or the setting that cannot be used.
    """
    model = config.model
    base = resolve_base(model, weights=False)
    vocab_size = load_hf_config(base).vocab_size
    if config.data.format in CHATS:
        RENDERER.start()
    tokenizer = load_tokenizer(str(base))

    def encode(name: str) -> EncodedDataset:
        sources = getattr(config.data, name)
        try:
            return load_encoded_dataset(sources, config.data, tokenizer, vocab_size=vocab_size)
        except SourceError as error:
            raise SourceError(f"data.{name}: {error}") from error

    train = encode("train")
    held_out = encode("eval") if config.data.eval else None
    RENDERER.close_unused()
    date = next((data.report.date for data in (train, held_out) if data and data.report.date), None)
    if config.data.date is not None and date is None:
        raise ValueError(
            f"data.date: {config.data.date} has no effect, since no chat template asks for today's "
            "date: remove it"
        )
    inputs = Inputs(base, tokenizer, train, held_out, read_own_template(config.data), date)
    inputs.stop_ids(needed=False)  # what it raises is about the files of the base
    return inputs


def input_notes(base: Path, adapter: str | None = None, *, trains: bool = True) -> list[str]:
    """Returns what of a base model's and an adapter's files is not read.

    Args:
        base: Folder of the base checkpoint.
        adapter: Folder of an adapter on it, if there is one.
        trains: Whether it is for a run, which encodes its rows by the base's tokenizer.
    """
    notes = [*load_hf_config(base).notes, *(adapter_notes(adapter) if adapter else ())]
    if adapter and trains and (names := tokenizer_files(adapter)):
        notes.append(
            f"{adapter} holds {', '.join(names)}, which are not read: a run takes the base's"
        )
    return notes


def build_model(config: RunConfig) -> CausalLM:
    """Loads the base model and puts fresh or loaded adapters on it, as the config says."""
    config = with_recorded_revision(config, print)
    return adapt_base(load_base(config), config, choose_recomputation(config)[0])
