"""Each setting says what it decides: for a run that goes on, and for the compiled step."""

from typing import Annotated

import pytest

from lorax.config.marks import Free, OfCompiling, OfRun, OfStep, find_marks
from lorax.config.run import RunConfig
from lorax.config.types import Section


def test_every_setting_carries_one_mark():
    marks = find_marks(RunConfig)  # refuses a field that carries none, or two
    for section, field in RunConfig.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        assert {f"{section}.{name}" for name in field.annotation.model_fields} <= marks.keys()


class Unmarked(Section):
    known: Annotated[int, OfStep] = 1
    new: int = 1


class Twice(Section):
    new: Annotated[int, OfRun, Free] = 1


class Whole(Section):
    part: Unmarked = Unmarked()


class Other(Section):
    part: Twice = Twice()


@pytest.mark.parametrize("model, count", [(Whole, 0), (Other, 2)])
def test_a_setting_without_a_mark_or_with_two_is_refused(model, count):
    with pytest.raises(TypeError, match=rf"part\.new has {count} marks of"):
        find_marks(model)


@pytest.mark.parametrize(
    "mark, names",
    [
        (OfStep, ["lora.r", "model.adapter", "train.learning_rate", "train.seed"]),
        (OfRun, ["data.packing", "eval.steps", "save.load_best_model_at_end"]),
        (OfCompiling, ["mesh.data", "train.skip_nonfinite_steps"]),
        (Free, ["model.revision", "data.train", "train.gradient_checkpointing", "save.export"]),
    ],
)
def test_settings_decide_what_they_should(mark, names):
    marks = find_marks(RunConfig)
    assert {marks[name] for name in names} == {mark}
