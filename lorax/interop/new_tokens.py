"""Tokens that a run adds to its base's vocabulary: in the tokenizer, the model and the files."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from lorax.adapters.targets import is_saved
from lorax.config.adapter import LoraConfig
from lorax.config.run import RunConfig
from lorax.data.chat.tokenizer import load_tokenizer
from lorax.data.chat.tokenizer_files import TOKENIZER_FILE
from lorax.interop.folder import TOKENIZER_FILES
from lorax.models.architecture import DecoderConfig
from lorax.models.decoder import CausalLM
from lorax.models.vocabulary import resize_vocabulary
from lorax.system.files import MAX_INDEX_BYTES, CheckpointError, read_json
from lorax.system.wording import show

NEW_TOKENS_FILE = "new_tokens.json"
"""In an adapter's folder: the tokens that it was trained with in addition to its base's."""

_TABLES = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}


@dataclasses.dataclass(frozen=True)
class NewTokens:
    """Tokens in addition to a tokenizer's, and their ids.

    Attributes:
        tokens: Their texts, which are never split.
        ids: Their ids, in the same order.
    """

    tokens: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: RunConfig, base: Path) -> Self:
        """Returns the new tokens of a run: those of `model.adapter`, else of `model.new_tokens`.

        Args:
            config: The run's settings.
            base: Folder of the base's tokenizer.

        Raises:
            ValueError: If a token is there already, or an adapter has others.
        """
        asked = config.model.new_tokens
        if config.model.adapter is not None:
            found = cls.read(config.model.adapter)
            if asked is not None and asked != found.tokens:
                had = ", ".join(map(show, found.tokens)) or "none"
                raise ValueError(
                    f"model.new_tokens: {config.model.adapter} keeps the tokens that it was "
                    f"trained with ({had}): remove this key"
                )
            return found
        if asked is None:
            return cls()
        known = load_tokenizer(str(base)).get_vocab()
        for token in asked:
            if token in known:
                raise ValueError(
                    f"model.new_tokens: {show(token)} is in the vocabulary of {base} already, as "
                    f"token {known[token]}: remove it here; lora.trainable_token_indices: "
                    f"[{known[token]}] trains it"
                )
        tokenizer = _extended(base, asked)
        return cls(asked, _ids_in(tokenizer, asked))

    @classmethod
    def read(cls, adapter: str | Path | None) -> Self:
        """Returns the new tokens that an adapter's folder records; none without a record.

        Raises:
            CheckpointError: If the record is damaged.
        """
        path = Path(adapter or "") / NEW_TOKENS_FILE
        if adapter is None or not path.is_file():
            return cls()
        raw = read_json(path)
        tokens: Any = raw.get("tokens")
        ids: Any = raw.get("ids")
        texts = isinstance(tokens, list) and all(isinstance(t, str) and t for t in tokens)
        numbers = isinstance(ids, list) and all(type(i) is int and 0 <= i < 2**31 for i in ids)
        if not (texts and numbers and len(tokens) == len(ids) == len(set(ids)) > 0):
            raise CheckpointError(
                f"{path} must hold tokens, a list of text, and ids, as many token ids; copy the "
                "file that was saved with the adapter"
            )
        return cls(tuple(tokens), tuple(ids))

    def load_tokenizer(self, base: Path) -> Any:
        """Returns the base's tokenizer with the tokens.

        Raises:
            CheckpointError: If they have other ids in it.
        """
        if not self.tokens:
            return load_tokenizer(str(base))
        tokenizer = _extended(base, self.tokens)
        found = _ids_in(tokenizer, self.tokens)
        if found != self.ids:
            raise CheckpointError(
                f"the tokenizer of {base} gives the new tokens {', '.join(map(show, self.tokens))} "
                f"the ids {found}, but they were trained as {self.ids}: it is another base's"
            )
        return tokenizer

    def grow(self, architecture: DecoderConfig) -> DecoderConfig:
        """Returns the architecture with rows for the tokens."""
        return dataclasses.replace(architecture, vocab_size=self._rows(architecture))

    def rows_to_add(self, architecture: DecoderConfig) -> int | None:
        """Returns the rows that a base must have, if it has fewer; else None."""
        rows = self._rows(architecture)
        return rows if rows > architecture.vocab_size else None

    def resize(self, model: CausalLM) -> CausalLM:
        """Returns a base with rows for the tokens, each the mean of the rows before the first."""
        if not self.ids:
            return model
        return resize_vocabulary(model, self._rows(model.config), tokens=self.ids)

    def trained_by(self, settings: LoraConfig, tied: bool) -> LoraConfig:
        """Returns the settings of an adapter that trains the tokens' rows too.

        Args:
            settings: Those of the run. A table that `modules_to_save` trains stays as it is.
            tied: Whether the head is the embedding.
        """
        if not self.ids:
            return settings
        given = settings.trainable_token_indices
        tables = dict(given if isinstance(given, Mapping) else {"embed_tokens": given or ()})
        saved = settings.modules_to_save or ()
        whole = {n for n in _TABLES if any(is_saved(_TABLES[n], entry) for entry in saved)}
        for name, full in _TABLES.items():
            keys = [key for key in tables if f".{full}".endswith(f".{key}")]
            if not keys and not (tied and name == "lm_head"):
                keys = [name]
            for key in () if name in whole or (tied and whole) else keys:
                tables[key] = tuple(dict.fromkeys((*tables.get(key, ()), *self.ids)))
        indices = {name: ids for name, ids in tables.items() if ids}
        return settings.model_copy(update={"trainable_token_indices": indices or None})

    def tokenizer_file(self, folder: Path) -> dict[str, str]:
        """Returns the tokenizer.json of a folder with the tokens, by its name; {} without tokens.

        Raises:
            CheckpointError: If the folder has none.
        """
        if not self.tokens:
            return {}
        raw = read_json(folder / TOKENIZER_FILE, MAX_INDEX_BYTES)
        added = raw.get("added_tokens") or []
        known = {each["content"] for each in added}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        new = [
            {"id": number, "content": token, **flags}
            for token, number in zip(self.tokens, self.ids, strict=True)
            if token not in known
        ]
        text = json.dumps(raw | {"added_tokens": [*added, *new]}, ensure_ascii=False, indent=2)
        return {TOKENIZER_FILE: text + "\n"}

    def adapter_files(
        self, folder: Path, replaced: Mapping[str, str | Path | None]
    ) -> dict[str, str | Path]:
        """Returns the files beside an adapter that was trained with the tokens; {} without any.

        Args:
            folder: Of the base's tokenizer.
            replaced: From `companion_files`.
        """
        if not self.tokens:
            return {}
        files: dict[str, str | Path | None] = {
            name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()
        }
        files |= {name: given for name, given in replaced.items() if name in TOKENIZER_FILES}
        record = json.dumps({"tokens": self.tokens, "ids": self.ids}, ensure_ascii=False)
        files |= {**self.tokenizer_file(folder), NEW_TOKENS_FILE: record + "\n"}
        return {name: given for name, given in files.items() if given is not None}

    def _rows(self, architecture: DecoderConfig) -> int:
        return max((architecture.vocab_size, *(number + 1 for number in self.ids)))


NO_NEW_TOKENS = NewTokens()


def _ids_in(tokenizer: Any, tokens: Sequence[str]) -> tuple[int, ...]:
    return tuple(int(tokenizer.convert_tokens_to_ids(token)) for token in tokens)


def _extended(base: Path, tokens: Sequence[str]) -> Any:
    from tokenizers import AddedToken

    if not (base / TOKENIZER_FILE).is_file():
        raise CheckpointError(f"model.new_tokens needs a {TOKENIZER_FILE}, and {base} has none")
    tokenizer: Any = load_tokenizer(str(base))
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens])
    return tokenizer
