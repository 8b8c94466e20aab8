"""The small files of an export: generation settings, tokenizer, chat template, card."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorax.data.chat.tokenizer_files import NAMED_TOKENS
from lorax.interop.folder import GENERATION_FILE, TOKENIZER_FILES
from lorax.interop.stop_tokens import generation_settings
from lorax.system.files import MAX_INDEX_BYTES, read_json

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_SETTINGS = "tokenizer_config.json"
_OLD_TEMPLATE_FILE = "chat_template.json"
_INLINE = "chat_template"
_CLASS = "tokenizer_class"


# Classes of transformers that take a tokenizer.json as it is; old versions know the second too.
_FAITHFUL = ("TokenizersBackend", "PreTrainedTokenizerFast")


def companion_files(
    base: Path,
    *,
    chat_template: str | None,
    stop_ids: Sequence[int] | None,
    card: str | None,
    tokenizer: Any = None,
    tokenizer_folder: Path | None = None,
) -> dict[str, str | Path | None]:
    """Returns the files of a merged export that replace the base's or are added to them.

    Args:
        base: Folder of the base checkpoint.
        chat_template: The run's own, which then is the only one; None leaves the one of the base's
            that transformers takes.
        stop_ids: The model's stop tokens; None leaves the base's.
        card: Text of the README.md.
        tokenizer: The tokenizer of the rows. Where it takes tokenizer.json as it is and the base
            names a class that may not, the export names one that does, and the tokens (BOS, …) that
            only the base's class knew; None leaves the base's.
        tokenizer_folder: The folder of all its files; None is the base's folder.

    Returns:
        Texts by the name of their file, or the path of one to copy; None for a file that is left
        out.
    """
    files: dict[str, str | Path | None] = {}
    source = tokenizer_folder or base
    if source != base:
        files |= {n: source / n if (source / n).is_file() else None for n in TOKENIZER_FILES}
    if stop_ids is not None:
        settings = generation_settings(base, stop_ids)
        if settings is not None:
            files[GENERATION_FILE] = _as_text(settings)
    path = source / TOKENIZER_SETTINGS
    before = read_json(path, MAX_INDEX_BYTES) if path.exists() else {}
    settings = dict(before)
    if chat_template is not None:
        files |= {TEMPLATE_FILE: chat_template, _OLD_TEMPLATE_FILE: None}
        # Some readers, llama.cpp's converter among them, take an inline template before the file.
        if _INLINE in settings:
            settings[_INLINE] = chat_template
    else:
        files |= _one_template(source, settings)
    if type(tokenizer).__name__ in _FAITHFUL and settings.get(_CLASS) not in _FAITHFUL:
        settings[_CLASS] = _FAITHFUL[-1]
        # A class may know them by itself, where no file names them; this one does not.
        own = {name: getattr(tokenizer, name) for name in NAMED_TOKENS}
        settings |= {n: str(t) for n, t in own.items() if t and settings.get(n) is None}
    if settings != before:
        files[TOKENIZER_SETTINGS] = _as_text(settings)
    if card is not None:
        files["README.md"] = card
    return files


def _one_template(source: Path, settings: dict[str, Any]) -> dict[str, None]:
    """Keeps only the template that transformers takes: a file before an inline one.

    Returns:
        The files to leave out; an inline template is removed from `settings`.
    """
    path = source / TEMPLATE_FILE
    if path.is_file() and _INLINE in settings:
        settings[_INLINE] = path.read_text(encoding="utf-8")
    has_other = path.is_file() or settings.get(_INLINE) is not None
    return {_OLD_TEMPLATE_FILE: None} if has_other else {}


def _as_text(settings: dict) -> str:
    return json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
