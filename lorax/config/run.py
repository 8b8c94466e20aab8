"""Every setting of a run: frozen, strict models whose names are PEFT's and Hugging Face's.

A config file is YAML with one section per model below; `load_config` reads it. An unknown key, a
wrong type or a value out of range is an error that names the file, the line and the key.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, override

from pydantic import Field, ValidationInfo, field_validator, model_validator

from lorax.config.adapter import LoraConfig
from lorax.config.data import DataConfig
from lorax.config.file import read_model, write_yaml
from lorax.config.marks import Free, OfCompiling, OfRun
from lorax.config.model import ModelConfig
from lorax.config.train import TrainConfig
from lorax.config.types import (
    Conflict,
    Count,
    CountOrMinusOne,
    FromList,
    Section,
    Text,
)
from lorax.system.wording import show


class EvalConfig(Section):
    """Evaluation on the held-out rows.

    Attributes:
        strategy: `steps`: every `steps` steps; `epoch`: after each epoch; `no`: before the first
            step and after the last alone.
        steps: Steps between two evaluations.
        per_device_eval_batch_size: Rows per device.
        early_stopping_patience: Evaluations without a better loss after which the run stops.
        exact_match: Also generates answers, before and after training, and compares them.
        exact_match_rows: Rows that get a generated answer.
        max_new_tokens: Longest generated answer in tokens.
    """

    strategy: Annotated[Literal["no", "steps", "epoch"], OfRun] = "no"
    steps: Annotated[Count, OfRun] = 100
    per_device_eval_batch_size: Annotated[Count, OfRun] = 8
    early_stopping_patience: Annotated[Count | None, OfRun] = None
    exact_match: Annotated[bool, Free] = False
    exact_match_rows: Annotated[Count, Free] = 200
    max_new_tokens: Annotated[Count, Free] = 64


class SaveConfig(Section):
    """Checkpoints and exports.

    Attributes:
        output_dir: Directory of the run.
        save_steps: Steps between two checkpoints.
        save_total_limit: Checkpoints to keep; older ones are removed once a newer one is verified.
        on_save_error: Reaction to a checkpoint that cannot be written, as on a full disk: `stop`
            ends the run, `warn` continues without it.
        load_best_model_at_end: Exports the weights with the lowest held-out loss.
        export: Formats of the exports; `("merged",)` when not given and `train.method` is `full`.
            `rebased`, for `pissa` and `olora`: the base without what the adapters began with, and
            the adapters of rank r on it.
    """

    output_dir: Annotated[Text, Free]
    save_steps: Annotated[Count, Free] = 100
    save_total_limit: Annotated[Count, Free] = 2
    on_save_error: Annotated[Literal["stop", "warn"], Free] = "stop"
    load_best_model_at_end: Annotated[bool, OfRun] = False
    export: Annotated[
        tuple[Literal["peft", "peft-portable", "merged", "rebased"], ...],
        Field(min_length=1),
        FromList,
        Free,
    ] = ("peft",)

    @override
    def conflicts(self) -> Iterator[Conflict]:
        if len(set(self.export)) < len(self.export):
            yield "export", f"names the same export twice: {', '.join(self.export)}"


class LogConfig(Section):
    """The record of the steps, and its formats.

    Attributes:
        logging_steps: Steps between two that are recorded, in the files of `report_to` and as a
            line in a log; so are the first and the last step, and one whose loss is not finite or
            far above those before. A log has a line of a step after a minute without one all the
            same; a terminal shows every step.
        report_to: `jsonl`: a line of `metrics.jsonl` in the run's folder, and `loss.png` of them at
            the end; `tensorboard`: scalars in its folder `tensorboard`.
    """

    logging_steps: Annotated[Count, Free] = 1
    report_to: Annotated[tuple[Literal["jsonl", "tensorboard"], ...], FromList, Free] = ("jsonl",)


class MeshConfig(Section):
    """The device mesh: `data` devices share each batch, -1 for all."""

    data: Annotated[CountOrMinusOne, OfCompiling] = 1


class RunConfig(Section):
    """A whole run; `load_config` reads one from a file."""

    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    data: DataConfig
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    save: SaveConfig
    log: LogConfig = LogConfig()
    mesh: MeshConfig = MeshConfig()

    @model_validator(mode="before")
    @classmethod
    def _drop_null_lora(cls, sections: Any) -> Any:
        """Takes ``lora: null`` for no section, so that an override can remove one."""
        if isinstance(sections, dict) and "lora" in sections and sections["lora"] is None:
            return {name: value for name, value in sections.items() if name != "lora"}
        return sections

    @field_validator("save")
    @classmethod
    def _resolve_export(cls, save: SaveConfig, info: ValidationInfo) -> SaveConfig:
        train = info.data.get("train")
        if train is None or train.method == "lora" or "export" in save.model_fields_set:
            return save
        return save.model_copy(update={"export": ("merged",)})

    @override
    def conflicts(self) -> Iterator[Conflict]:
        if self.model.adapter is not None and "lora" in self.model_fields_set:
            yield "lora", "model.adapter brings its own settings: remove it, or set lora=null"
        if self.train.method == "full":
            if "lora" in self.model_fields_set:
                yield "lora", "train.method `full` has no adapter: remove it, or set lora=null"
            if self.model.adapter is not None:
                yield "model.adapter", "train.method `full` has no adapter: remove this key"
            if self.model.offload_embedding:
                yield "model.offload_embedding", "train.method `full` trains it: remove this key"
            if self.model.quantization != "none":
                yield (
                    "model.quantization",
                    "train.method `full` trains all weights: remove this key",
                )
            if self.save.export != ("merged",):
                got = ", ".join(self.save.export)
                yield "save.export", f"train.method `full` can only export `merged`, got {got}"
        saved_rate = self.train.modules_to_save_learning_rate
        reads_lora = self.train.method == "lora" and self.model.adapter is None
        if saved_rate is not None and reads_lora and not self.lora.modules_to_save:
            key = "train.modules_to_save_learning_rate"
            yield key, "needs modules that are trained whole: set lora.modules_to_save"
        wants_evaluation = {
            "eval.early_stopping_patience": self.eval.early_stopping_patience is not None,
            "save.load_best_model_at_end": self.save.load_best_model_at_end,
        }
        wants_data = {
            "eval.strategy": self.eval.strategy != "no",
            "eval.exact_match": self.eval.exact_match,
        }
        for key, wanted in {**wants_evaluation, **wants_data}.items():
            if wanted and not self.data.eval:
                yield key, "needs held-out rows: set data.eval"
            elif wanted and key in wants_evaluation and self.eval.strategy == "no":
                yield key, "needs evaluations during the run: set eval.strategy to steps or epoch"


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML config.

    Args:
        path: The file.
        overrides: ``section.key=value`` entries that replace those of the file; values are YAML, or
            the text itself where a key takes nothing else.

    Returns:
        The checked config.

    Raises:
        ConfigError: With one line per problem: file and line (or the override), dotted key, what
            came and what was needed.
        TypeError: If the overrides are no list of text.
    """
    if isinstance(overrides, str) or not all(isinstance(each, str) for each in overrides):
        raise TypeError(f"overrides must be a list such as ['lora.r=8'], got {show(overrides)}")
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be that of a YAML file, got {show(path)}")
    return read_model(RunConfig, path, overrides)


def dump_config(config: RunConfig, *, defaults: bool = True) -> str:
    """Writes a config as YAML, which `load_config` reads back unchanged.

    Args:
        config: The settings.
        defaults: Whether settings that have their defaults are written too.
    """
    sections = config.model_dump(mode="json", exclude_defaults=not defaults)
    if defaults:
        settings = config.train.lr_scheduler_kwargs
        sections["train"]["lr_scheduler_kwargs"] = settings.model_dump(exclude_none=True)
        if config.train.method == "full" or config.model.adapter is not None:
            del sections["lora"]
    return write_yaml(sections)
