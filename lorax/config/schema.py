"""The schema of a config model: sections, their keys, and the values they take."""

import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel

type Key = tuple[str | int, ...]
"""Names of sections and of a key; a list entry has its index."""


FAMILIAR = {
    "alpha": "lora.lora_alpha",
    "batch_size": "train.per_device_train_batch_size",
    "dropout": "lora.lora_dropout",
    "embedding_learning_rate": "train.modules_to_save_learning_rate",
    "embedding_lr": "train.modules_to_save_learning_rate",
    "epochs": "train.num_train_epochs",
    "evaluation_strategy": "eval.strategy",
    "eval_steps": "eval.steps",
    "eval_strategy": "eval.strategy",
    "lr": "train.learning_rate",
    "lr_scheduler": "train.lr_scheduler_type",
    "max_length": "data.max_seq_length",
    "micro_batch_size": "train.per_device_train_batch_size",
    "neftune_alpha": "train.neftune_noise_alpha",
    "optimizer": "train.optim",
    "rank": "lora.r",
    "sequence_len": "data.max_seq_length",
}
"""Keys of other trainers, and the keys here that they stand for."""

_WRITTEN = "lorax writes it into adapter_config.json itself: leave it out"
UNNEEDED = dict.fromkeys(
    ("task_type", "inference_mode", "peft_type", "base_model_name_or_path"), _WRITTEN
)
"""The keys of PEFT's `LoraConfig` that are no settings here, and why."""


def find_sections(model: type[BaseModel]) -> dict[Key, type[BaseModel]]:
    """Returns every model below `model` by its key; the entries of a list have the key `*`."""
    found: dict[Key, type[BaseModel]] = {(): model}
    for name, field in model.model_fields.items():
        for below, part in _models_in(field.annotation):
            found |= {(name, *below, *key): value for key, value in find_sections(part).items()}
    return found


def find_section(model: type[BaseModel], key: Key) -> type[BaseModel] | None:
    """Returns the model of a section, or None if there is none."""
    return find_sections(model).get(tuple("*" if isinstance(part, int) else part for part in key))


def find_types(model: type[BaseModel], key: Key) -> frozenset[Any]:
    """Returns the types that a key takes; none where there is no such key."""
    section = find_section(model, key[:-1])
    field = section.model_fields.get(str(key[-1])) if section else None
    return frozenset(_types_in(field.annotation)) if field else frozenset()


def _models_in(annotation: Any) -> Iterator[tuple[Key, type[BaseModel]]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield (), annotation
    for argument in typing.get_args(annotation):
        if isinstance(argument, type) and issubclass(argument, BaseModel):
            yield ("*",), argument


def _types_in(annotation: Any) -> Iterator[Any]:
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        for argument in arguments:
            yield from _types_in(argument)
    elif origin is Annotated:
        yield from _types_in(arguments[0])
    else:
        yield origin or annotation
