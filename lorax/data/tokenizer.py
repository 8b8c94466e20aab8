"""Tokenizers: how one is loaded, and what one says about a text."""

import dataclasses
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Int32, Int64

from lorax.data.rows import DataError
from lorax.interop.files import refuse_stand_ins

if TYPE_CHECKING:
    import transformers

type Tokenizer = transformers.PreTrainedTokenizerBase

WITHOUT_TORCH = threading.Event()
"""Set where no one needs torch in this process: transformers imports it if it can, for seconds."""


def load_tokenizer(name_or_path: str, revision: str | None = None) -> Tokenizer:
    """Loads the tokenizer of a model.

    Code that comes with a model is never run, and a local directory sends nothing anywhere.

    Args:
        name_or_path: A directory in Hugging Face layout, or a hub id.
        revision: Branch, tag or commit on the hub.

    Returns:
        A fast tokenizer: one that knows which characters a token stands for.

    Raises:
        ValueError: If there is none, or only a slow one, or one that makes nothing of a text.
    """
    local = Path(name_or_path).is_dir()
    if not local and (Path(name_or_path).is_absolute() or name_or_path.startswith(("./", "../"))):
        raise ValueError(f"{name_or_path}: no such directory to load a tokenizer from")
    for path in sorted(Path(name_or_path).glob("*token*")) if local else ():
        refuse_stand_ins(path)
    transformers = _import_transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name_or_path, revision=revision, trust_remote_code=False, local_files_only=local
        )
    except BaseException as error:
        # The tokenizers library panics on some files, which is no Exception.
        panicked = type(error).__name__ == "PanicException"
        if isinstance(error, MemoryError) or not (panicked or isinstance(error, Exception)):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        raise ValueError(
            f"{name_or_path}: cannot load its tokenizer; needed is a tokenizer.json: {reason}"
        ) from error
    check_fast(tokenizer)
    if not tokenizer.encode("a text", add_special_tokens=False):
        # Of a folder without its files transformers makes one that knows nothing.
        raise ValueError(
            f"{name_or_path}: its tokenizer makes no token of a text; needed is a tokenizer.json: "
            "copy the files that came with the model's tokenizer"
        )
    return tokenizer


def _import_transformers() -> Any:
    """Imports transformers, which takes a second or more, and torch with it if it may."""
    hides = WITHOUT_TORCH.is_set() and "torch" not in sys.modules
    if hides:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import transformers

        transformers.utils.is_torch_available()  # which it remembers
        return transformers
    finally:
        if hides:
            del sys.modules["torch"]


def check_fast(tokenizer: Tokenizer) -> None:
    """Raises DataError unless the tokenizer can tell the characters of a token."""
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which cannot tell the characters a "
            "token stands for; needed is a fast one, with a tokenizer.json"
        )


@dataclasses.dataclass(frozen=True)
class TokenizedText:
    """Token ids of a text and the characters ``[starts, ends)`` each stands for."""

    ids: Int32[np.ndarray, " tokens"]
    starts: Int64[np.ndarray, " tokens"]
    ends: Int64[np.ndarray, " tokens"]

    def inside(self, start: int, end: int) -> Bool[np.ndarray, " tokens"]:
        """Tells which tokens stand for a character of ``[start, end)``."""
        return (self.ends > start) & (self.starts < end)


def tokenize_texts(
    tokenizer: Tokenizer, texts: Sequence[str], *, add_special_tokens: bool
) -> list[TokenizedText]:
    """Tokenizes each text once, without truncation or padding.

    Args:
        tokenizer: A fast one.
        texts: Any number of texts.
        add_special_tokens: Whether to add what the tokenizer adds to a text, such as BOS. A
            rendered chat template already holds it.
    """
    if not texts:
        return []
    encoding = tokenizer(
        list(texts),
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        truncation=False,
        padding=False,
        verbose=False,
    )
    return [
        _with_reach(np.asarray(ids, np.int32), np.asarray(offsets, np.int64).reshape(-1, 2))
        for ids, offsets in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
    ]


def named_token_id(tokenizer: Tokenizer, name: Literal["bos", "eos", "unk"]) -> int | None:
    """Returns the id of a named token, or None if the tokenizer has none."""
    found = getattr(tokenizer, f"{name}_token_id")
    return None if found is None else int(found)


def special_token_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Returns the ids of all tokens that are flagged special, named (EOS, …) or added."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset({*tokenizer.all_special_ids, *(i for i, token in added if token.special)})


def _with_reach(
    ids: Int32[np.ndarray, " tokens"], offsets: Int64[np.ndarray, "tokens 2"]
) -> TokenizedText:
    starts, ends = offsets[:, 0], offsets[:, 1]
    # A byte-level tokenizer that trims offsets leaves a token of white space with no characters:
    # it stands for those after the token before it.
    before = np.concatenate([np.zeros(1, np.int64), np.maximum.accumulate(ends)])[:-1]
    return TokenizedText(ids, np.where(starts == ends, np.minimum(before, starts), starts), ends)
