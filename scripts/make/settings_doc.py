"""Writes docs/settings.md from the config models: every key, its default, and what it means.

python -m scripts.make.settings_doc            # writes it
python -m scripts.make.settings_doc --check    # says whether it is what would be written
"""

import argparse
import inspect
import re
import sys
import typing
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lorax.config.run import RunConfig
from lorax.config.train import LrSchedulerKwargs
from lorax.config.types import Section

FILE = Path(__file__).parents[2] / "docs" / "settings.md"
HEAD = """# Settings

Every key of a config, made from the docstrings by `scripts/make/settings_doc.py`. A key that is
not here is an error, and so is a value of another type. `lorax train CONFIG key=value …` overrides
single keys, such as `train.learning_rate=1e-4`. Values are YAML; a key that takes nothing but text
takes it as it stands: `data.response_part=Assistant:`. `lorax inspect CONFIG` prints what a config
changes, and with `--verbose` every setting.
"""


def read_attributes(section: type[Section]) -> dict[str, str]:
    """Returns key → text of the docstring's attributes."""
    lines = inspect.getdoc(section) or ""
    _, _, listed = lines.partition("Attributes:\n")
    found: dict[str, str] = {}
    name = ""
    for line in listed.splitlines():
        if match := re.match(r"    (\w+): (.*)", line):
            name, text = match.groups()
            found[name] = text
        elif line.strip():
            found[name] += " " + line.strip()
    return found


def show_default(field: FieldInfo) -> str:
    """Returns the default as it stands in YAML."""
    value = field.default
    if value is PydanticUndefined:
        return "needed"
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    if isinstance(value, Section):
        return ""
    return f"`{value}`"


def list_words(annotation: Any) -> list[str]:
    """Returns the words among which a value is chosen."""
    if typing.get_origin(annotation) is typing.Literal:
        words = typing.get_args(annotation)
        return [str(word).lower() if isinstance(word, bool) else word for word in words]
    return [word for part in typing.get_args(annotation) for word in list_words(part)]


def describe(section: type[Section], prefix: str) -> list[str]:
    """Returns the rows of a section's table."""
    meanings = read_attributes(section)
    rows = []
    for name, field in section.model_fields.items():
        text = meanings.get(name, "")
        unsaid = [word for word in list_words(field.annotation) if f"`{word}`" not in text]
        if unsaid:
            words = ", ".join(f"`{word}`" for word in list_words(field.annotation))
            text = f"{text} One of {words}.".strip()
        text = text.replace("``", "`").replace("|", "\\|")
        rows.append(f"| `{prefix}{name}` | {show_default(field)} | {text} |")
        if field.annotation is LrSchedulerKwargs:
            rows += describe(LrSchedulerKwargs, f"{prefix}{name}.")
    return rows


def make_document() -> str:
    """Returns the whole text."""
    parts = [HEAD]
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        assert isinstance(section, type) and issubclass(section, Section)
        first = (inspect.getdoc(section) or "").splitlines()[0]
        parts.append(f"## {name}\n\n{first}\n\n| key | default | |\n|---|---|---|\n")
        parts[-1] += "\n".join(describe(section, f"{name}.")) + "\n"
    return "\n".join(parts)


def main() -> None:
    """Writes the document, or compares it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        is_new = FILE.is_file() and FILE.read_text(encoding="utf-8") == make_document()
        sys.exit(None if is_new else f"{FILE} is not up to date: run this without --check")
    FILE.write_text(make_document(), encoding="utf-8")


if __name__ == "__main__":
    main()
