"""The setup of a run: tokenizer, data, model and course, computed once before it begins."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Self

from lorax.config.run import RunConfig
from lorax.data.chat.renderer import RENDERER
from lorax.data.chat.template import read_own_template
from lorax.data.dataset import EncodedDataset
from lorax.data.reading.rows import SourceError
from lorax.interop.adapter_base import with_recorded_revision
from lorax.interop.adapter_tokenizer import tokenizer_files
from lorax.interop.new_tokens import NewTokens
from lorax.interop.peft_config import adapter_notes
from lorax.interop.stop_tokens import stop_token_ids
from lorax.models.architecture import DecoderConfig
from lorax.models.decoder import CausalLM
from lorax.models.stack.recompute import Recomputation
from lorax.objectives.objectives import objective_of
from lorax.recovery.identity import Identity, fingerprint_folder, identify_rows
from lorax.runs.folder import keep_date
from lorax.runs.memory import choose_recomputation, recomputed_before, recomputed_in
from lorax.runs.model import Blueprint, adapt_base
from lorax.system.arguments import check_kind
from lorax.training.course import Course

CHATS = ("auto", "messages", "sharegpt", "alpaca")
"""Formats of data whose rows a chat template renders, or may render."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """All that is computed before a run begins; later code only reads it.

    `lorax plan` uses the blueprint, `lorax inspect` also the rows, `lorax validate` also the
    course, `lorax train` all of it.

    Attributes:
        config: The run's settings, with the day given to its chat template.
        blueprint: Its model, without the weights.
        identity: Its identity, compared with the run that it resumes.
        tokenizer: The base model's tokenizer, with the new tokens.
        train: Encoded rows to learn from.
        eval: Encoded held-out rows.
        chat_template: Text of the run's own template; None where it is the tokenizer's.
        stop_ids: Stop tokens of the trained model; empty if there are none.
    """

    config: RunConfig
    blueprint: Blueprint
    identity: Identity
    tokenizer: Any
    train: EncodedDataset
    eval: EncodedDataset | None
    chat_template: str | None
    stop_ids: tuple[int, ...]

    @classmethod
    def of(cls, blueprint: Blueprint, identity: Identity | None = None) -> Self:
        """Reads the tokenizer and the data of a run.

        Raises:
            ValueError: Naming the file, the line or the setting that cannot be used.
        """
        config = blueprint.config
        base = blueprint.folder
        if config.data.format in CHATS:
            RENDERER.start()
        tokenizer = blueprint.new_tokens.load_tokenizer(base)
        train = _encode("train", blueprint, tokenizer)
        held_out = _encode("eval", blueprint, tokenizer) if config.data.eval else None
        RENDERER.close_unused()
        dates = [data.report.date for data in (train, held_out) if data and data.report.date]
        if config.data.date is not None and not dates:
            raise ValueError(
                f"data.date: {config.data.date} has no effect, since no chat template asks for "
                "today's date: remove it"
            )
        return cls(
            config=keep_date(config, dates[0] if dates else None),
            blueprint=blueprint,
            identity=identity or Identity(),
            tokenizer=tokenizer,
            train=train,
            eval=held_out,
            chat_template=read_own_template(config.data),
            stop_ids=stop_token_ids(base, tokenizer, train.report.stop_ids, needed=False),
        )

    @property
    def datasets(self) -> dict[str, EncodedDataset]:
        """The data by name, training data first."""
        return {"train": self.train} | ({} if self.eval is None else {"eval": self.eval})

    @functools.cached_property
    def course(self) -> Course:
        """The course of the run; built on first access, because it starts the devices.

        Raises:
            ValueError: If the mesh asks for absent devices, or the schedule does not fit the run.
        """
        return Course.of(self.config, self.train, self.eval, mesh=self.blueprint.mesh)

    @functools.cached_property
    def recomputation(self) -> tuple[Recomputation, str]:
        """The recomputation of the backward pass, and the reason for it.

        Raises:
            ValueError: If `train.memory_gib` is too little.
        """
        return choose_recomputation(self.blueprint, recomputed_in(self.identity))

    def identify(self) -> dict[str, Any]:
        """Returns the parts of the run's identity that are known before its weights are read."""
        base = self.blueprint.folder
        adapter = self.config.model.adapter
        files = ("tokenizer*", "chat_template*", "special_tokens_map.json")
        return {
            "devices": self.course.mesh.size,
            "gradient checkpointing": str(self.recomputation[0]),
            **identify_rows(self.train, self.eval),
            "tokenizer": fingerprint_folder(base, files),
            "adapter": adapter and fingerprint_folder(Path(adapter), ("adapter_*",)),
        }

    def needed_stop_ids(self) -> tuple[int, ...]:
        """Returns the stop tokens of the trained model.

        Raises:
            ValueError: If there are none.
        """
        base = self.blueprint.folder
        trained = self.train.report.stop_ids
        return self.stop_ids or stop_token_ids(base, self.tokenizer, trained)


def _encode(name: str, blueprint: Blueprint, tokenizer: Any) -> EncodedDataset:
    data = blueprint.config.data
    vocab_size = blueprint.architecture.vocab_size
    encode = objective_of(blueprint.config).encode
    try:
        return encode(getattr(data, name), data, tokenizer, vocab_size=vocab_size)
    except SourceError as error:
        raise SourceError(f"data.{name}: {error}") from error


def identify_base(folder: Path) -> dict[str, Any]:
    """Returns the base model's part of a run's identity, once its files are on the disk."""
    files = ("*.safetensors", "*.safetensors.index.json", "config.json")
    return {"base model": fingerprint_folder(folder, files)}


def input_notes(
    architecture: DecoderConfig, adapter: str | None = None, *, trains: bool = True
) -> list[str]:
    """Returns notes on unread parts of a base model's and an adapter's files.

    Args:
        architecture: The base model's architecture.
        adapter: Folder of an adapter on it, if there is one.
        trains: Whether the notes are for a run, which trains the adapter and encodes its rows by
            the base's tokenizer.
    """
    notes = [*architecture.notes, *(adapter_notes(adapter, trains=trains) if adapter else ())]
    names = tokenizer_files(adapter) if adapter and trains else []
    if names and not NewTokens.read(adapter).tokens:
        notes.append(
            f"{adapter} holds {', '.join(names)}, which are not read: a run takes the base's"
        )
    return notes


def build_model(config: RunConfig) -> CausalLM:
    """Loads the base model and puts fresh or loaded adapters on it, as the config asks.

    Raises:
        TypeError: If `config` is no `RunConfig`.
        ValueError: Naming the setting, the file or the tensor that cannot be used.
    """
    check_kind("config", config, RunConfig, "a lorax.RunConfig, as lorax.load_config returns")
    blueprint = Blueprint.of(with_recorded_revision(config, print))
    model = blueprint.load(blueprint.fetch())
    recomputation, _ = choose_recomputation(blueprint, recomputed_before(config))
    return adapt_base(model, blueprint, recomputation)
