"""Marks on settings: whether a resumed run must share them, and whether they decide the step."""

import dataclasses

from pydantic import BaseModel


@dataclasses.dataclass(frozen=True)
class Mark:
    """The effect of changing a setting; each field of a section carries one mark.

    Attributes:
        stays: Whether a resumed run must share it, to come to the same bits.
        in_step: Whether it decides the compiled step.
    """

    stays: bool
    in_step: bool


OfStep = Mark(stays=True, in_step=True)
OfRun = Mark(stays=True, in_step=False)
"""A setting that decides which rows are learned or which weights are kept, but no compiled step."""

OfCompiling = Mark(stays=False, in_step=True)
"""A setting that changes the compiled step, but no bit of its results."""

Free = Mark(stays=False, in_step=False)
"""All others: paths, whose files have fingerprints; settings of reports, saving and waiting; and
settings whose outcome is compared instead."""


def find_marks(model: type[BaseModel]) -> dict[str, Mark]:
    """Returns the mark of each field of each section by its dotted name.

    Raises:
        TypeError: If a field has none, or two.
    """
    return {
        f"{section}.{name}": _mark_of(f"{section}.{name}", below.metadata)
        for section, field in model.model_fields.items()
        for name, below in getattr(field.annotation, "model_fields", {}).items()
    }


def _mark_of(name: str, metadata: list[object]) -> Mark:
    marks = [mark for mark in metadata if isinstance(mark, Mark)]
    if len(marks) != 1:
        raise TypeError(f"{name} has {len(marks)} marks of {__name__} and needs one")
    return marks[0]
