"""What a setting decides, as a mark on its field: for a run that goes on, and for its step."""

import dataclasses

from pydantic import BaseModel


@dataclasses.dataclass(frozen=True)
class Mark:
    """What follows if a setting is another one; each field of a section carries one.

    Attributes:
        stays: Whether a run that goes on must have it as it was, to come to the same bits.
        in_step: Whether it decides what the step is compiled to.
    """

    stays: bool
    in_step: bool


OfStep = Mark(stays=True, in_step=True)
OfRun = Mark(stays=True, in_step=False)
"""It decides which rows are learned, or which weights are kept, but nothing of a step."""

OfCompiling = Mark(stays=False, in_step=True)
"""Another step, which comes to the same bits."""

Free = Mark(stays=False, in_step=False)
"""Where things are, which fingerprints of what is there cover; what is reported, written, waited
for; and what is chosen by it, which is compared instead."""


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
