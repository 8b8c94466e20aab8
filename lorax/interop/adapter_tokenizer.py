"""The tokenizer of an adapter: its folder's own, if it has one, as for PEFT and vLLM."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorax.data.chat.template import read_template
from lorax.data.chat.tokenizer import load_tokenizer
from lorax.interop.folder import TOKENIZER_FILES
from lorax.interop.new_tokens import NewTokens
from lorax.system.files import MAX_INDEX_BYTES, read_json

_VOCABULARIES = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"}
_TEMPLATE_FILE = "chat_template.jinja"
_SETTINGS = "tokenizer_config.json"
_INLINE = "chat_template"


@dataclasses.dataclass(frozen=True)
class FoundTokenizer:
    """The tokenizer for prompts to an adapter.

    Attributes:
        tokenizer: The tokenizer, with the chat template.
        folder: The folder of its files.
        chat_template: The template, where it differs from that of these files.
        is_own: Whether tokenizer or template is the adapter's own.
    """

    tokenizer: Any
    folder: Path
    chat_template: str | None = None
    is_own: bool = False


def tokenizer_files(folder: str | Path) -> list[str]:
    """Returns the names of a tokenizer's files in a folder."""
    return [name for name in TOKENIZER_FILES if (Path(folder) / name).exists()]


def find_tokenizer(
    base: Path,
    adapter: str | Path | None = None,
    *,
    run: Path | None = None,
    tell: Callable[[str], object],
) -> FoundTokenizer:
    """Returns the tokenizer of an adapter's folder, or the base's where there is none.

    A folder with a chat template alone gives it to the base's tokenizer; a tokenizer without a chat
    template gets the base's.

    Args:
        base: Folder of the base checkpoint.
        adapter: Folder of the adapter, if there is one.
        run: Folder of the run that wrote the adapter, if it is known: its rows were encoded by the
            base's tokenizer.
        tell: Called with a line about the files used, where the adapter has some.

    Raises:
        ValueError: If a tokenizer or a template cannot be read, with its folder.
    """
    names = tokenizer_files(adapter) if adapter is not None else []
    if adapter is None or not names:
        return FoundTokenizer(load_tokenizer(str(base)), base)
    adapter = Path(adapter)
    listed = ", ".join(names)
    new = NewTokens.read(adapter)
    if new.tokens:  # lorax wrote these files, of the base's tokenizer with new tokens
        tokenizer = load_tokenizer(str(adapter))
        return FoundTokenizer(tokenizer, adapter, is_own=True)
    if run is not None:
        tell(f"{adapter} holds {listed}, which are not used: the run in {run} trained without them")
        return FoundTokenizer(load_tokenizer(str(base)), base)
    if not _VOCABULARIES.isdisjoint(names):
        return _own_tokenizer(base, adapter, listed, tell)
    tokenizer = load_tokenizer(str(base))
    template = _own_template(adapter)
    if template is None:
        tell(
            f"{adapter} holds {listed}, but no tokenizer and no chat template: the base's are used"
        )
        return FoundTokenizer(tokenizer, base)
    tell(f"the chat template is the adapter's own, of {adapter}; the tokenizer is the base's")
    tokenizer.chat_template = template
    return FoundTokenizer(tokenizer, base, template, is_own=True)


def _own_tokenizer(base: Path, adapter: Path, listed: str, tell) -> FoundTokenizer:
    tokenizer = load_tokenizer(str(adapter))
    template = None
    if tokenizer.chat_template is None and tokenizer_files(base):
        template = load_tokenizer(str(base)).chat_template
        tokenizer.chat_template = template
    whose = "and chat template are" if template is None else "is"
    rest = "" if template is None else "; the chat template is the base's, since it has none"
    tell(f"the tokenizer {whose} the adapter's own, of {adapter} ({listed}){rest}")
    text = template if isinstance(template, str) else None
    return FoundTokenizer(tokenizer, adapter, text, is_own=True)


def _own_template(adapter: Path) -> str | None:
    if (adapter / _TEMPLATE_FILE).exists():
        return read_template(adapter / _TEMPLATE_FILE)
    path = adapter / _SETTINGS
    inline = read_json(path, MAX_INDEX_BYTES).get(_INLINE) if path.exists() else None
    return inline if isinstance(inline, str) else None
