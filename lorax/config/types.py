"""Parts of the config models: a strict, frozen section and the types of its values."""

import inspect
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Self, get_type_hints, override

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from lorax.config.explain import ConfigError, dotted, explain_values
from lorax.system.wording import clip, show

type Conflict = tuple[str, str]
"""A dotted key below the section, and what is wrong with its value."""


class _Explained(type(BaseModel)):
    """Explains what is wrong with the values of a section that is made in Python.

    pydantic makes the sections of a file without this call, and `lorax.config.file` explains them.
    """

    if not TYPE_CHECKING:  # which knows a section's signature without it

        def __call__(cls, *unnamed: Any, **values: Any) -> Any:
            if unnamed:
                first = next(iter(cls.model_fields))
                raise TypeError(f"{cls.__name__} takes its settings by name, such as {first}=…")
            try:
                return super().__call__(**values)
            except ValidationError as error:
                found = explain_values(error, cls, values)
                lines = [f"{cls.__name__}: {dotted(key)}: {message}" for key, message in found]
                raise ConfigError("\n".join(dict.fromkeys(lines))) from None


class Section(BaseModel, metaclass=_Explained):
    """A frozen model that refuses unknown keys, other types, NaN and infinity.

    Raises:
        ConfigError: With one line per problem: section, key, what came and what was needed.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    @override
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        """Gives the section a signature of plain types, which `help` shows."""
        super().__pydantic_init_subclass__(**options)
        types = get_type_hints(cls)
        found = inspect.signature(cls)
        plain = [each.replace(annotation=types[name]) for name, each in found.parameters.items()]
        cls.__signature__ = found.replace(parameters=plain)

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
"""The largest int32, in which JAX counts steps, rows and ranks."""

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
Names = Annotated[tuple[Text, ...], Field(min_length=1), FromList]
Modules = Annotated[
    Text | Annotated[tuple[Text, ...], Field(min_length=1)],
    AfterValidator(_check_regex_if_text),
    FromList,
]
"""A regular expression, or a list of name endings."""
