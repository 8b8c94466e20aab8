"""The files of a tokenizer, checked before a library reads them."""

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorax.system.files import MAX_INDEX_BYTES, CheckpointError, read_json, refuse_stand_ins

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"

VOCABULARY_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")
"""Files that are read only where there is no tokenizer.json."""

NAMED_TOKENS = tuple(f"{n}_token" for n in ("bos", "eos", "unk", "pad", "sep", "cls", "mask"))

_SWITCHES = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "clean_up_tokenization_spaces",
    "legacy",
    "split_special_tokens",
)

_HEAD = 2**20
"""Characters of a tokenizer.json in which its steps are looked for first."""

_FIELD = re.compile(r"Validation error for field '(\w+)'")
_TYPES = re.compile(r"expected (\w+), got (\w+)")
_NAMES = {
    "NoneType": "null",
    "bool": "true or false",
    "dict": "an object",
    "float": "a number with a point",
    "int": "a whole number",
    "list": "a list",
    "str": "text",
}
"""Of types, as transformers' checks of config.json name them."""

type Steps = dict[str, Any]
"""Parts of a tokenizer.json that change ids, without the vocabulary."""

MODEL_OPTIONS = (
    "byte_fallback",
    "continuing_subword_prefix",
    "dropout",
    "end_of_word_suffix",
    "fuse_unk",
    "ignore_merges",
    "unk_token",
)


def explain_field(error: BaseException) -> str | None:
    """Returns the field of config.json that transformers refuses, if that is the error.

    transformers reads the tokenizer's class from there.
    """
    field = _FIELD.search(str(error))
    types = _TYPES.findall(str(error))
    if type(error).__name__ != "StrictDataclassFieldValidationError" or not (field and types):
        return None
    needed = dict.fromkeys(str(_NAMES.get(wanted, wanted)) for wanted, _ in types)
    got = _NAMES.get(types[0][1], types[0][1])
    return (
        f"config.json: {field[1]} must be {' or '.join(needed)}, got {got}: transformers, which "
        "loads the tokenizer, reads it too"
    )


def check_tokenizer_files(folder: Path) -> None:
    """Refuses files with other content than their names promise, and fields of another type.

    Raises:
        CheckpointError: Naming the file, the fields, the values found and those needed.
    """
    names = [TOKENIZER_FILE, CONFIG_FILE, "special_tokens_map.json", "added_tokens.json"]
    if not (folder / TOKENIZER_FILE).exists():
        names += VOCABULARY_FILES
    for name in names:
        if (folder / name).exists():
            refuse_stand_ins(folder / name)
    problems = []
    for name in (CONFIG_FILE, "special_tokens_map.json"):
        path = folder / name
        # Thousands of added tokens, one by one, are more than a megabyte: Gemma 3 has them.
        settings = read_json(path, MAX_INDEX_BYTES) if path.exists() else {}
        wrong = [
            f"{key} must be {needed}, got {_show(settings[key])}"
            for key, (fits, needed) in _FIELDS.items()
            if key in settings and not fits(settings[key])
        ]
        if wrong:
            problems.append(f"{path}: {'; '.join(wrong)}")
    if problems:
        raise CheckpointError(". ".join(problems))


def read_steps(path: Path) -> Steps:
    """Returns the steps of a tokenizer.json: normalizer, pre-tokenizer and the model's options.

    Raises:
        ValueError: If it is not JSON of this form.
    """
    # Vocabulary and merges come last as a rule; they are most of the file, and slow to parse.
    with path.open(encoding="utf-8") as file:
        text = file.read(_HEAD)
        steps = {}
        with contextlib.suppress(ValueError):
            head = text.partition('"vocab"')[0].rstrip().removesuffix(",")
            steps = json.loads(head + "}}")
        if not {"normalizer", "pre_tokenizer", "model"} <= steps.keys():
            steps = json.loads(text + file.read())
    if not isinstance(steps, dict) or not isinstance(steps.get("model"), dict):
        raise CheckpointError(f"{path} names no model of a tokenizer")
    return comparable_steps(steps.get("normalizer"), steps.get("pre_tokenizer"), steps["model"])


def comparable_steps(normalizer: Any, pre_tokenizer: Any, model: Steps) -> Steps:
    """Returns steps such that equal ones give equal ids, without options of offsets."""
    options = {name: model.get(name) or None for name in MODEL_OPTIONS}
    return {"model": options, "normalizer": normalizer, "pre_tokenizer": _plain(pre_tokenizer)}


def _plain(step: Any) -> Any:
    if isinstance(step, dict):
        return {key: _plain(value) for key, value in step.items() if key != "trim_offsets"}
    return [_plain(value) for value in step] if isinstance(step, list) else step


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, dict) and isinstance(value.get("content"), str)
    )


def _is_template(value: Any) -> bool:
    def named(v):
        return isinstance(v, dict) and all(
            isinstance(v.get(key), str) for key in ("name", "template")
        )

    return value is None or isinstance(value, str) or _is_list(value, named)


def _is_list(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(fits, value))


def _are_added(value: Any) -> bool:
    return isinstance(value, dict) and all(
        key.isdecimal() and isinstance(token, dict) and _is_token(token)
        for key, token in value.items()
    )


def _are_extra(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return value is None or _is_list(value, _is_token)


def _show(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 60 else f"{shown[:57]}…"


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model_max_length": (
        lambda v: v is None or (type(v) in (int, float) and v > 0),
        "a number above 0",
    ),
    **dict.fromkeys(_SWITCHES, (lambda v: v is None or isinstance(v, bool), "true, false or null")),
    **dict.fromkeys(
        NAMED_TOKENS,
        (
            lambda v: v is None or _is_token(v),
            "a token's text, an object with its content, or null",
        ),
    ),
    "added_tokens_decoder": (_are_added, "an object of token ids and objects with a content"),
    "additional_special_tokens": (_are_extra, "a list of tokens"),
    "extra_special_tokens": (_are_extra, "a list of tokens, or an object of named tokens"),
    "chat_template": (_is_template, "text, or a list of objects with name and template"),
    "tokenizer_class": (lambda v: v is None or isinstance(v, str), "text"),
    "padding_side": (lambda v: v in ("left", "right"), '"left" or "right"'),
    "truncation_side": (lambda v: v in ("left", "right"), '"left" or "right"'),
    "model_input_names": (lambda v: _is_list(v, lambda n: isinstance(n, str)), "a list of names"),
    "auto_map": (lambda v: isinstance(v, dict | list), "an object"),
}
"""Field -> what fits, and its name. Others change nothing that lorax uses."""
