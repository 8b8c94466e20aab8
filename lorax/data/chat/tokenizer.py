"""Loading a tokenizer, and tokenizing texts with offsets."""

import dataclasses
import json
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import huggingface_hub
import numpy as np
from jaxtyping import Bool, Int32, Int64

from lorax.data.chat.tokenizer_files import (
    MODEL_OPTIONS,
    NAMED_TOKENS,
    TOKENIZER_FILE,
    check_tokenizer_files,
    comparable_steps,
    explain_field,
    read_steps,
)
from lorax.data.reading.rows import DataError
from lorax.system.hub import explain_hub
from lorax.system.wording import clip

if TYPE_CHECKING:
    import transformers

# transformers is used for tokenizers only: its warning about missing PyTorch does not matter.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

type Tokenizer = transformers.PreTrainedTokenizerBase

WITHOUT_TORCH = threading.Event()
"""Set where this process needs no torch: transformers imports it if it can, which takes seconds."""


_CHARACTERS_AT_ONCE = 2**20

_TORCH_DTYPES = ("bfloat16", "float16", "float32", "float64", "half", "float", "double")
"""Names of dtypes that torch accepts in a config.json."""


def load_tokenizer(name_or_path: str, revision: str | None = None) -> Tokenizer:
    """Loads the tokenizer of a model, as defined by its own tokenizer.json.

    Some classes of transformers keep a tokenizer.json's vocabulary and replace its other steps:
    where that gives other ids, the file's are used, and a warning shows a difference.
    Code that comes with a model is never run, and a local directory sends nothing anywhere.

    Args:
        name_or_path: A directory in Hugging Face layout, or a hub id.
        revision: Branch, tag or commit on the hub.

    Returns:
        A fast tokenizer: one that knows which characters a token stands for.

    Raises:
        ValueError: If there is none, or only a slow one, or one without tokens for a text, or a
            file of it has other content than its name promises.
    """
    local = Path(name_or_path).is_dir()
    if not local and (Path(name_or_path).is_absolute() or name_or_path.startswith(("./", "../"))):
        raise ValueError(f"{name_or_path}: no such directory to load a tokenizer from")
    if local:
        check_tokenizer_files(Path(name_or_path))
    transformers = _import_transformers()
    options = {"revision": revision, "trust_remote_code": False, "local_files_only": local}
    own = None
    try:
        config = _config_without_dtype(name_or_path, options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name_or_path, config=config, **options
        )
        check_fast(tokenizer)
        if _replaces_steps(tokenizer, _find_file(name_or_path, revision)):
            own = transformers.PreTrainedTokenizerFast.from_pretrained(name_or_path, **options)
        known = (own or tokenizer).encode("a text", add_special_tokens=False)
    except BaseException as error:
        # The tokenizers library panics on some files, which is no Exception.
        panicked = type(error).__name__ == "PanicException"
        ours = isinstance(error, MemoryError | DataError)
        if ours or not (panicked or isinstance(error, Exception)):
            raise
        if field := explain_field(error):
            raise ValueError(f"{name_or_path}/{field}") from error
        if not local and (absent := explain_hub(error, revision)):
            raise ValueError(
                f"{name_or_path}: no such folder, and its tokenizer is not to be had from the "
                f"Hugging Face hub: {absent}"
            ) from error
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        raise ValueError(
            f"{name_or_path}: cannot load its tokenizer; needed is a tokenizer.json: {reason}"
        ) from error
    if not known:
        # For a folder without its files transformers builds an empty tokenizer.
        raise ValueError(
            f"{name_or_path}: its tokenizer gives no token for a text; needed is a tokenizer.json: "
            "copy the files that came with the model's tokenizer"
        )
    if own is None:
        return tokenizer
    _complete_names(own, tokenizer)
    _tell_differences(own, tokenizer, name_or_path)
    return own


def _config_without_dtype(name_or_path: str, options: dict[str, Any]) -> Any:
    """Returns the model's config without its dtype, where that is no name of a dtype; else None.

    transformers reads config.json for the tokenizer's class, and asks torch for the dtype named
    there: torch has no ``auto``, which leaves the dtype to the tensors.
    """
    transformers = _import_transformers()
    try:
        fields, _ = transformers.PreTrainedConfig.get_config_dict(name_or_path, **options)
    except (OSError, ValueError):
        return None  # there is none, or AutoTokenizer will raise its error
    names = [fields.get(key) for key in ("dtype", "torch_dtype")]
    if all(name is None or name in _TORCH_DTYPES for name in names):
        return None
    fields = {k: v for k, v in fields.items() if k not in ("dtype", "torch_dtype")}
    known = fields.get("model_type") in transformers.CONFIG_MAPPING
    kind = transformers.CONFIG_MAPPING[fields["model_type"]] if known else None
    return (kind or transformers.PreTrainedConfig).from_dict(fields, name_or_path=name_or_path)


def _find_file(name_or_path: str, revision: str | None) -> Path | None:
    """Returns the tokenizer.json of a tokenizer that was just loaded, if it has one."""
    if Path(name_or_path).is_dir():
        path = Path(name_or_path) / TOKENIZER_FILE
        return path if path.is_file() else None
    found = huggingface_hub.try_to_load_from_cache(name_or_path, TOKENIZER_FILE, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _replaces_steps(tokenizer: Any, file: Path | None) -> bool:
    """Says whether a tokenizer's class has replaced the steps in its files."""
    if type(tokenizer).__name__ == "TokenizersBackend":  # the class that takes a file as it is
        return False
    backend = tokenizer.backend_tokenizer
    if file is None:
        # A SentencePiece model alone, whose scores and settings TokenizersBackend follows, or
        # vocabulary and merges, which name no steps.
        return type(backend.pre_tokenizer).__name__ == "Metaspace"

    def state(step):
        return step and json.loads(step.__getstate__())

    options = {name: getattr(backend.model, name, None) for name in MODEL_OPTIONS}
    steps = comparable_steps(state(backend.normalizer), state(backend.pre_tokenizer), options)
    return steps != read_steps(file)


def _complete_names(own: Any, rebuilt: Any) -> None:
    """Gives `own` the named tokens that only the class of `rebuilt` knows, and no file."""
    for name, token in rebuilt.special_tokens_map.items():
        if name in NAMED_TOKENS and getattr(own, name) is None and token in own.get_vocab():
            setattr(own, name, token)


def _tell_differences(own: Any, rebuilt: Any, source: str) -> None:
    """Warns if transformers would give other ids than the files, with the first difference."""
    for text in _probes(own):
        right, other = (t.encode(text, add_special_tokens=False) for t in (own, rebuilt))
        if right != other:
            warnings.warn(
                f"{source}: lorax takes the token ids that its own files give. AutoTokenizer of "
                f"transformers gives others: its {type(rebuilt).__name__} makes {other} of "
                f"{text!r}, the files make {right}. Where the model is served, load the tokenizer "
                "with PreTrainedTokenizerFast.from_pretrained, or set tokenizer_class to "
                "PreTrainedTokenizerFast in its tokenizer_config.json",
                stacklevel=3,
            )
            return


def _probes(tokenizer: Any) -> Iterator[str]:
    """Yields short texts on which tokenizers of one vocabulary differ."""
    for special in dict.fromkeys(tokenizer.all_special_tokens):
        yield from (f"{special}a", f"{special} a", f"a {special}\na")
    yield from (" a", "  a", "a  b   c", " ", "\n a", "\n\n  a\r\n", "\ta", "▁a", "a\u00a0b")
    yield from ("12345 3.14", "don't I'LL", "e\u0301 ﬁ", "漢字かな", "👍🏽", "a_b(c);//", "a--b...")


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
    """Raises DataError unless the tokenizer gives the characters of each token."""
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which does not know the characters a "
            "token stands for; needed is a fast one, with a tokenizer.json"
        )


@dataclasses.dataclass(frozen=True)
class TokenizedText:
    """Token ids of a text and the characters ``[starts, ends)`` each stands for."""

    ids: Int32[np.ndarray, " tokens"]
    starts: Int64[np.ndarray, " tokens"]
    ends: Int64[np.ndarray, " tokens"]

    def inside(self, start: int, end: int) -> Bool[np.ndarray, " tokens"]:
        """Returns which tokens stand for a character of ``[start, end)``."""
        return (self.ends > start) & (self.starts < end)

    def find_lost(self, text: str) -> list[int]:
        """Returns the places of visible characters of `text` that no token stands for."""
        depth = np.zeros(len(text) + 1, np.int64)
        np.add.at(depth, self.starts, 1)
        np.add.at(depth, self.ends, -1)
        bare = np.flatnonzero(np.cumsum(depth)[:-1] == 0)
        return [int(place) for place in bare if not text[place].isspace()]


def tokenize_texts(
    tokenizer: Tokenizer, texts: Sequence[str], *, add_special_tokens: bool
) -> list[TokenizedText]:
    """Tokenizes each text once, without truncation or padding.

    Args:
        tokenizer: A fast one.
        texts: Any number of texts.
        add_special_tokens: Whether to add the tokenizer's special tokens, such as BOS. A rendered
            chat template already holds them.

    Raises:
        DataError: If it fails, as where its vocabulary lacks what its model needs.
    """
    if not texts:
        return []
    try:
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
    except Exception as error:  # of no class of its own, from the tokenizers library
        raise DataError(
            f"the tokenizer fails on a text: {clip(str(error), 200)}; use the tokenizer files that "
            "came with the model"
        ) from error
    return [
        _with_reach(_narrow(ids), np.asarray(offsets, np.int64).reshape(-1, 2))
        for ids, offsets in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
    ]


def tokenize_in_parts(
    tokenizer: Tokenizer, texts: Sequence[str], *, add_special_tokens: bool
) -> Iterator[TokenizedText]:
    """Yields the results of `tokenize_texts`, a few texts at a time: renderings may be long.

    While it tokenizes, the library allocates a hundred bytes and more for each character.
    """
    part = []
    size = 0
    for text in texts:
        if part and size + len(text) > _CHARACTERS_AT_ONCE:
            yield from tokenize_texts(tokenizer, part, add_special_tokens=add_special_tokens)
            part = []
            size = 0
        part.append(text)
        size += len(text)
    yield from tokenize_texts(tokenizer, part, add_special_tokens=add_special_tokens)


def named_token_id(tokenizer: Tokenizer, name: Literal["bos", "eos", "unk"]) -> int | None:
    """Returns the id of a named token, or None if the tokenizer has none."""
    found = getattr(tokenizer, f"{name}_token_id")
    return None if found is None else int(found)


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the ids of all tokens that are flagged special, named (EOS, …) or added, by text."""
    added = tokenizer.added_tokens_decoder.items()
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return {token.content: number for number, token in added if token.special} | dict(named)


def _narrow(ids: Sequence[int]) -> Int32[np.ndarray, " tokens"]:
    wide = np.asarray(ids, np.int64)
    if (highest := int(wide.max(initial=0))) > np.iinfo(np.int32).max:
        raise DataError(
            f"the tokenizer gives the token id {highest}, more than any model's vocabulary has; "
            "use the tokenizer of the model"
        )
    return wide.astype(np.int32)


def _with_reach(
    ids: Int32[np.ndarray, " tokens"], offsets: Int64[np.ndarray, "tokens 2"]
) -> TokenizedText:
    starts = offsets[:, 0]
    ends = offsets[:, 1]
    # A byte-level tokenizer that trims offsets gives a token of white space no characters. It
    # stands for those after the token before it.
    before = np.concatenate([np.zeros(1, np.int64), np.maximum.accumulate(ends)])[:-1]
    return TokenizedText(ids, np.where(starts == ends, np.minimum(before, starts), starts), ends)
