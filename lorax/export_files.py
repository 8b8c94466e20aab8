"""The small files beside exported weights, which say how they are used as they were trained."""

import json
from collections.abc import Sequence
from pathlib import Path

from lorax.interop.checkpoint import GENERATION_FILE
from lorax.interop.files import read_json
from lorax.stop_tokens import generation_settings

TEMPLATE_FILE, TOKENIZER_SETTINGS = "chat_template.jinja", "tokenizer_config.json"
_OLD_TEMPLATE_FILE = "chat_template.json"
_INLINE = "chat_template"


def companion_files(
    base: Path, *, chat_template: str | None, stop_ids: Sequence[int] | None, card: str | None
) -> dict[str, str | None]:
    """Returns what stands beside merged weights instead of the base's files, or besides them.

    Args:
        base: Folder of the base checkpoint.
        chat_template: The run's own, which then is the only one; None leaves the base's.
        stop_ids: What the model stops with; None leaves what the base says.
        card: Text of the README.md.

    Returns:
        Texts by the name of their file; None for a file that is left out.
    """
    files: dict[str, str | None] = {}
    if stop_ids is not None:
        settings = generation_settings(base, stop_ids)
        if settings is not None:
            files[GENERATION_FILE] = _as_text(settings)
    if chat_template is not None:
        files |= {TEMPLATE_FILE: chat_template, _OLD_TEMPLATE_FILE: None}
        # Some readers, llama.cpp's converter among them, take an inline template before the file.
        settings = base / TOKENIZER_SETTINGS
        inline = read_json(settings) if settings.exists() else {}
        if _INLINE in inline:
            files[TOKENIZER_SETTINGS] = _as_text(inline | {_INLINE: chat_template})
    if card is not None:
        files["README.md"] = card
    return files


def _as_text(settings: dict) -> str:
    return json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
