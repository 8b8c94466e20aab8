"""A config that is read a second time, and what was taken of it compared with what was given."""

import math
from collections.abc import Iterator
from typing import Any


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value if abs(value) < 1e300 else math.inf


def second_reading(text: str) -> Any:
    import yaml

    return yaml.safe_load(text)


def put(document: Any, keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        document = document.setdefault(key, {}) if isinstance(document, dict) else document
        document = {} if document is None else document
    if isinstance(document, dict):
        document[keys[-1]] = value


def differences(given: Any, taken: Any, place: str = "") -> Iterator[str]:
    if isinstance(given, dict) and isinstance(taken, dict):
        for key, value in given.items():
            if key not in taken:
                yield f"{place}{key}"
            else:
                yield from differences(value, taken[key], f"{place}{key}.")
        return
    if place in ("data.train.", "data.eval.") and not same(given, taken):
        given = [given] if isinstance(given, str | dict) else given or []
        paths = [{"path": item} if isinstance(item, str) else item for item in given]
        for one, other in zip(paths, taken, strict=True):
            yield from differences(one, other, f"{place}source.")
        return
    if isinstance(given, list) and isinstance(taken, list) and len(given) == len(taken):
        for one, other in zip(given, taken, strict=True):
            yield from differences(one, other, place)
        return
    if not same(given, taken):
        yield f"{place}: {given!r} and {taken!r}"


def same(given: Any, taken: Any) -> bool:
    if given is None:  # an empty section, or a key that is null as it is when it is not given
        return taken in (None, [], {}) or isinstance(taken, dict)
    if isinstance(given, str) and isinstance(taken, float):
        given = float(given)  # YAML 1.1 takes 1e-4 for text
    if isinstance(given, str) and isinstance(taken, int | str):
        return str(taken) == given or str(taken).lower() == given.lower() or of_octal(given, taken)
    if isinstance(given, bool) and isinstance(taken, str):
        return taken in (("yes", "on", "true") if given else ("no", "off", "false"))
    return type(given) in (type(taken), int, float) and given == taken


def of_octal(given: str, taken: Any) -> bool:
    return given.startswith("0o") and int(given, 8) == taken


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{place}.{key}")
    else:
        yield place, value
