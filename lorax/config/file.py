"""Reads a strict YAML file into a pydantic model, with errors that name file, line and key."""

import io
import json
import math
import os
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from lorax.config.explain import ConfigError, dotted, explain_values, show_value
from lorax.config.schema import Key, find_types
from lorax.system.small_files import SmallFileError, read_small_file
from lorax.system.wording import clip, clip_words, explain, show

_ONLY_TEXT = (frozenset({str}), frozenset({str, type(None)}))


type _Problem = tuple[float, str]  # line, message


class _Source:
    """The file and line, or the override, of each value of a config."""

    def __init__(self, file: str):
        self.file = file
        self.lines: dict[tuple[str, ...], int] = {}
        self.overrides: dict[tuple[str, ...], str] = {}

    def problem(self, key: Key, message: str) -> _Problem:
        """Puts the place of `key`, or of the nearest section around it, before a message."""
        text = clip_words(f"{dotted(key)}: {message}" if key else message)
        written = tuple(str(part) for part in key)
        around = [written[:length] for length in range(len(written), -1, -1)]
        for place in around:
            if place in self.overrides:
                return math.inf, f"override {show(self.overrides[place])}: {text}"
        for place in around[:-1]:
            if place in self.lines:
                return self.lines[place], f"{clip(self.file, 300)}:{self.lines[place]}: {text}"
        return 0, f"{clip(self.file, 300)}: {text}"

    def replace(self, key: tuple[str, ...], override: str) -> None:
        for known in [*self.lines, *self.overrides]:
            if known[: len(key)] == key:
                self.lines.pop(known, None)
                self.overrides.pop(known, None)
        self.overrides[key] = override


def read_model[Model: BaseModel](
    model: type[Model], path: str | os.PathLike[str], overrides: Sequence[str] = ()
) -> Model:
    """Reads a YAML file (YAML 1.2, one document, UTF-8) into `model`.

    Args:
        model: The root model; its fields are the sections of the file.
        path: The file.
        overrides: ``section.key=value`` entries that replace what the file says.

    Returns:
        The checked model.

    Raises:
        ConfigError: If the file cannot be read or does not fit `model`; all problems at once.
    """
    source = _Source(os.fspath(path))
    data, problems = _parse(_read_text(source.file), source)
    for override in overrides:
        problems.extend(_apply_override(model, data, override, source))
    try:
        config = model.model_validate(data)
    except ValidationError as error:
        found = explain_values(error, model, data)
        problems.extend(source.problem(key, message) for key, message in found)
    else:
        if not problems:
            return config
    ordered = sorted(problems, key=lambda problem: problem[0])
    raise ConfigError("\n".join(dict.fromkeys(message for _, message in ordered)))


def check_model[Model: BaseModel](model: type[Model], data: Any, file: str) -> Model:
    """Checks data that `file` holds in another form than YAML.

    Raises:
        ConfigError: As `read_model`, without lines.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        found = explain_values(error, model, data)
        source = _Source(file)
        messages = [source.problem(key, message)[1] for key, message in found]
        raise ConfigError("\n".join(messages)) from error


def write_yaml(data: dict[str, Any]) -> str:
    """Writes plain data as block-style YAML 1.2 that reads back equal."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    yaml.width = 1_000_000  # never folds a text over lines
    yaml.allow_unicode = True
    stream = io.StringIO()
    yaml.dump(data, stream)
    return stream.getvalue()


def _read_text(file: str) -> str:
    if not file:
        raise ConfigError("the path of the config is empty: give that of a YAML file")
    try:
        raw = read_small_file(file)
    except SmallFileError as error:
        raise ConfigError(f"{clip(file, 300)}: cannot read the config: {error}") from error
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        message = f"needs UTF-8, got byte 0x{raw[error.start]:02x}: save the file as UTF-8"
        raise ConfigError(f"{file}:{line}: {message}") from error


def _parse(text: str, source: _Source) -> tuple[dict[Any, Any], list[_Problem]]:
    """Returns the data and the duplicate keys; raises what leaves nothing to check."""
    try:
        data, problems = _load(text, (), source)
    except RecursionError as error:
        raise ConfigError(f"{source.file}: nested too deeply for a config") from error
    except YAMLError as error:
        raise ConfigError(f"{source.file}{_explain_yaml(error, text)}") from error
    except ValueError as error:  # such as a date in month 13
        raise ConfigError(f"{source.file}: not valid YAML: {explain(error)}") from error
    if data is None:
        raise ConfigError(f"{source.file}: the file is empty: it needs sections such as `model:`")
    if not isinstance(data, dict):
        message = f"needs sections such as `model:` and `data:`, got {show_value(data)}"
        raise ConfigError(f"{source.file}:{source.lines[()]}: {message}")
    return data, problems


def _load(text: str, key: tuple[str, ...], source: _Source) -> tuple[Any, list[_Problem]]:
    """Returns the value of a YAML text and its duplicate keys, and records its lines."""
    yaml = YAML(typ="safe", pure=True)
    yaml.allow_duplicate_keys = True  # loading would stop at the first; the walk finds them all
    root = yaml.compose(io.StringIO(text))
    problems = [] if root is None else list(_walk(root, key, source, set()))
    return yaml.load(io.StringIO(text)), problems


def _explain_yaml(error: YAMLError, text: str) -> str:
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        line = error.problem_mark.line + 1
        reason = error.problem
    else:
        line = text.count("\n", 0, getattr(error, "position", 0)) + 1
        reason = getattr(error, "reason", error)
    lines = text.splitlines()
    written = lines[line - 1] if line <= len(lines) else ""
    if "\t" in written[: len(written) - len(written.lstrip())]:
        reason = "indented with a tab: use spaces"
    elif "unhashable key" in str(reason):
        reason = "a key must be a word, not a list or a mapping"
    return f":{line}: not valid YAML: {reason}"


def _walk(node: Node, key: tuple[str, ...], source: _Source, seen: set[int]) -> Iterator[_Problem]:
    """Records the line of every value; yields the duplicate keys."""
    if id(node) in seen:
        problem = "anchors and aliases (& and *) are not read here: write the value out"
        raise MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    seen.add(id(node))
    source.lines.setdefault(key, node.start_mark.line + 1)
    if isinstance(node, MappingNode):
        first: dict[str, int] = {}
        for name_node, value_node in node.value:
            name = name_node.value if isinstance(name_node, ScalarNode) else str(name_node.tag)
            source.lines[(*key, name)] = line = name_node.start_mark.line + 1
            if name in first:
                message = f"duplicate key, first on line {first[name]}: keep one"
                yield source.problem((*key, name), message)
            first.setdefault(name, line)
            yield from _walk(value_node, (*key, name), source, seen)
    elif isinstance(node, SequenceNode):
        for index, child_node in enumerate(node.value):
            yield from _walk(child_node, (*key, str(index)), source, seen)


def _apply_override(
    model: type[BaseModel], data: dict[Any, Any], override: str, source: _Source
) -> list[_Problem]:
    """Sets one value in `data`; returns why it could not."""
    written, equals, text = override.partition("=")
    names = tuple(written.strip().split("."))
    where = f"override {show(override)}"
    if not equals or not all(names):
        return [(math.inf, f"{where}: needs section.key=value, such as train.max_steps=10")]
    try:
        value, problems = _read_value(text, names, override, find_types(model, names))
    except ValueError as error:
        return [(math.inf, f"{where}: {clip(written)}: {error}")]
    section = data
    for depth, name in enumerate(names[:-1], start=1):
        if name not in section:
            source.overrides[names[:depth]] = override
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            parent = dotted(names[:depth])
            found = f"{parent} is {show_value(section)}, not a section"
            return [(math.inf, f"{where}: {found}: override {parent} as a whole")]
    section[names[-1]] = value
    source.replace(names, override)
    return problems


def _read_value(
    text: str, names: tuple[str, ...], override: str, kinds: frozenset[Any]
) -> tuple[Any, list[_Problem]]:
    """Returns the value of an override and its duplicate keys.

    A key that takes nothing but text takes it as it stands: `Assistant:` would be a mapping to
    YAML, and `### Answer` a comment. Quoted it is YAML, and so is null.

    Raises:
        ValueError: If YAML does not read it, or reads something else than is written.
    """
    written = text.strip()
    if kinds in _ONLY_TEXT and written not in ("", "null", "~") and written[0] not in "'\"":
        return text, []
    own = _Source("")
    own.overrides[()] = override
    remedy = ""
    if kinds & {str, tuple}:
        quoted = shlex.quote(f"{dotted(names)}={json.dumps(text, ensure_ascii=False)}")
        remedy = f"; if it is meant as text, quote it for YAML and the shell: {quoted}"
    try:
        root = YAML(typ="safe", pure=True).compose(io.StringIO(text))
        value, problems = _load(text, names, own)
    except (YAMLError, RecursionError, ValueError) as error:
        reason = getattr(error, "problem", None) or explain(error)
        raise ValueError(f"not valid YAML: {reason}{remedy}") from error
    if remedy and text[root.end_mark.index if root else 0 :].strip():
        raise ValueError(f"from the # on it is a comment to YAML{remedy}")
    if remedy and isinstance(value, dict) and written[0] != "{":
        raise ValueError(f"a colon makes a mapping of it in YAML{remedy}")
    return value, problems
