"""Explains pydantic's errors in words that name the key and the value it needs."""

import difflib
import re
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from lorax.config.schema import FAMILIAR, UNNEEDED, Key, find_section, find_sections
from lorax.system.wording import clip, show

_NEEDED = {
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_type": "a whole number",
    "invalid_key": "a text key",
    "string_type": "text",
    "string_unicode": "text of whole characters",
    "greater_than": "a number > {gt}",
    "greater_than_equal": "a number >= {ge}",
    "less_than": "a number < {lt}",
    "less_than_equal": "a number <= {le}",
    "too_short": "at least {min_length} entry",
    "tuple_type": "a list",
    "dict_type": "a mapping (`key: value` lines)",
    "model_type": "a mapping (`key: value` lines)",
}


class ConfigError(ValueError):
    """A config that cannot be used; the message has one line per problem."""


def explain_values(
    error: ValidationError, model: type[BaseModel], data: Any
) -> Iterator[tuple[Key, str]]:
    """Yields one key and problem for each key that is wrong.

    What the branches of a union need is joined by "or".

    Args:
        error: What pydantic found.
        model: The model that the values are for.
        data: The values, as they were given.
    """
    needed: dict[Key, list[str]] = {}
    got: dict[Key, Any] = {}
    settled: set[Key] = set()
    for item in error.errors(include_url=False):
        kind = item["type"]
        context = item.get("ctx", {})
        key = _find_key(data, item["loc"], keep_last=kind == "missing")
        if written := _without_space(key, item["input"]):
            settled.add(key)
            yield (key[:-1], f"a space is missing after the colon: write {written}")
        elif kind == "conflicts":
            for name, message in context["conflicts"]:
                yield ((*key, *name.split(".")), message)
        elif kind == "extra_forbidden":
            yield (key, f"unknown key; {_suggest(model, key)}")
        elif kind == "missing":
            yield (key, f"missing: {_describe_missing(model, key)}")
        elif kind == "value_error":
            settled.add(key)
            yield (key, str(context["error"]))
        else:
            got[key] = item["input"]
            needed.setdefault(key, []).append(_describe_needed(kind, context, item["msg"]))
    for key, phrases in needed.items():
        # One branch of a union got further: what the others needed is no help.
        others = (*needed, *settled)
        below = [other for other in others if other != key and other[: len(key)] == key]
        if not below and key not in settled:
            message = f"needs {' or '.join(dict.fromkeys(phrases))}, got {show_value(got[key])}"
            yield (key, message + _hint(phrases, got[key]))


def _without_space(key: Key, value: Any) -> str | None:
    """Returns what was meant by a key such as ``q_proj:8``, which to YAML has no value."""
    found = re.fullmatch(r"([\w.]+):(.*\S)", str(key[-1])) if key and value is None else None
    return f"{{{clip(found[1])}: {clip(found[2])}}}" if found else None


def _find_key(data: Any, location: Sequence[str | int], keep_last: bool) -> Key:
    """Drops what pydantic adds to a location: names of union branches and of validators."""
    key: list[str | int] = []
    for index, part in enumerate(location):
        is_entry = isinstance(data, list | tuple) and isinstance(part, int) and part < len(data)
        if is_entry or (isinstance(data, dict) and part in data):
            data = typing.cast(Any, data)[part]
            key.append(part)
        elif keep_last and index == len(location) - 1:
            key.append(part)
    return tuple(key)


def _describe_needed(kind: str, context: dict[str, Any], message: str) -> str:
    if kind == "literal_error":
        return str(context["expected"]).replace("'", "`").replace("True", "true")
    return _NEEDED[kind].format(**context) if kind in _NEEDED else f"another value ({message})"


def _describe_missing(model: type[BaseModel], key: Key) -> str:
    section = find_section(model, key)
    if section is None:
        return "this key has no default, set it"
    required = [name for name, field in section.model_fields.items() if field.is_required()]
    return f"this section needs {', '.join(f'{dotted(key)}.{name}' for name in required)}"


def _suggest(model: type[BaseModel], key: Key) -> str:
    """Returns the likely key: the same name in another section, or the nearest name in this one."""
    name = str(key[-1])
    section = find_section(model, key[:-1])
    names = list(section.model_fields) if section else []
    places = [
        dotted((*place, name))
        for place, other in find_sections(model).items()
        if place and "*" not in place and name in other.model_fields
    ]
    near = difflib.get_close_matches(name, names, n=1)
    near += [known for known in names if name.startswith(f"{known}_")]
    meant = places + [dotted((*key[:-1], known)) for known in near]
    if name in UNNEEDED:
        return UNNEEDED[name]
    if name in FAMILIAR:
        own = FAMILIAR[name].rpartition(".")[2]
        meant = [dotted((*key[:-1], own)) if own in names else FAMILIAR[name]]
    if meant:
        return f"did you mean {' or '.join(dict.fromkeys(meant))}?"
    of_section = f" of {dotted(key[:-1])}" if key[:-1] else ""
    return f"the keys{of_section} are {', '.join(names)}"


def _hint(phrases: list[str], value: Any) -> str:
    """Names the nearest allowed word, or the number a quoted text would be."""
    if not isinstance(value, str):
        return ""
    words = re.findall(r"`([^`]+)`", " ".join(phrases))
    near = difflib.get_close_matches(value, words, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    if not any("number" in phrase for phrase in phrases):
        return ""
    try:
        float(value)
    except ValueError:
        return ""
    return ": remove the quotes"


def dotted(key: Key) -> str:
    """Returns a key as it is written in an override, such as ``lora.r``."""
    return ".".join(clip(str(part)) for part in key)


def show_value(value: Any) -> str:
    """Returns a value in words, and a list or mapping by its size."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text {show(value)}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"a mapping with {len(value)} keys"
    if isinstance(value, int | bytes):
        return show(value)
    return clip(str(value))
