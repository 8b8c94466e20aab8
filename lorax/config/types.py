"""What the config models are made of: a strict, frozen section and the types of its values."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from lorax.system.wording import clip, show

type Conflict = tuple[str, str]
"""A dotted key below the section, and what is wrong with its value."""


class Section(BaseModel):
    """A frozen model that refuses unknown keys, other types, NaN and infinity."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    def conflicts(self) -> Iterator[Conflict]:
        """Yields what is wrong between values that are right one by one."""
        return iter(())

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        found = list(self.conflicts())
        if found:
            text = "; ".join(f"{key}: {message}" for key, message in found)
            raise PydanticCustomError("conflicts", "{text}", {"text": text, "conflicts": found})
        return self


def _tuple_from_list(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _refuse_integer(value: Any) -> Any:
    # `1 == True`, so a Literal[True] alone takes it.
    if isinstance(value, int) and not isinstance(value, bool):
        raise ValueError(f"needs true or a word, got the number {show(value)}")
    return value


def _check_not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError(f"needs text that is not empty, got {show(text)}")
    if "\0" in text:
        raise ValueError(f"needs text without a NUL character, got {show(text)}")
    return text


def check_regex(pattern: str) -> str:
    """Returns `pattern`; raises ValueError unless it is a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        reason = clip(str(error))
        raise ValueError(f"needs a regular expression, got {show(pattern)}: {reason}") from error
    return pattern


def _check_regex_if_text(value: Any) -> Any:
    return check_regex(value) if isinstance(value, str) else value


def _check_count_or_all(value: int) -> int:
    if value != -1 and value < 1:
        raise ValueError(f"needs a whole number >= 1, or -1, got {show(value)}")
    return value


MOST = 2**31 - 1
"""What JAX counts steps, rows and ranks in."""

Text = Annotated[str, AfterValidator(_check_not_blank)]
Count = Annotated[int, Field(ge=1, le=MOST)]
CountOrMinusOne = Annotated[int, Field(le=MOST), AfterValidator(_check_count_or_all)]
Index = Annotated[int, Field(ge=0, le=MOST)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
# A list in YAML or Python becomes a tuple, so that a config cannot change after it was checked.
FromList = BeforeValidator(_tuple_from_list)
NotInteger = BeforeValidator(_refuse_integer)
Names = Annotated[tuple[Text, ...], Field(min_length=1), FromList]
Modules = Annotated[
    Text | Annotated[tuple[Text, ...], Field(min_length=1)],
    AfterValidator(_check_regex_if_text),
    FromList,
]
"""A regular expression, or a list of name endings."""
