"""The stop tokens of scoring, generating and exporting."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lorax.interop.folder import CONFIG_FILE, GENERATION_FILE
from lorax.system.files import CheckpointError, read_json

STOP_TOKENS_FILE = "stop_tokens.json"
"""The file in a run's folder with its model's stop tokens, trained ones included."""

_KEY = "eos_token_id"


def stop_token_ids(
    directory: str | Path,
    tokenizer: Any = None,
    trained: Iterable[int] = (),
    *,
    needed: bool = True,
) -> tuple[int, ...]:
    """Returns every token that ends a text, each once.

    First come those in a checkpoint's files, since some readers pad with the first one:
    ``eos_token_id`` of generation_config.json, of config.json and of the tokenizer (chat models end
    a turn with one and a text with another). Then come the trained ones: a chat template may end
    turns with a token that the base model does not stop at.

    Args:
        directory: Folder of the checkpoint.
        tokenizer: Anything with ``eos_token_id``, or None.
        trained: Those at the end of learned turns; see `EncodeReport.stop_ids`.
        needed: Whether none is an error.

    Raises:
        ValueError: If there are none, or a file holds something else; with the file and the key.
    """
    found: list[int] = []
    for name in (GENERATION_FILE, CONFIG_FILE):
        path = Path(directory) / name
        if path.exists():
            found += _token_ids(read_json(path), path)
    own = getattr(tokenizer, _KEY, None)
    found += [*([] if own is None else [int(own)]), *sorted(map(int, trained))]
    if needed and not found:
        raise CheckpointError(
            f"{directory}: neither {GENERATION_FILE}, {CONFIG_FILE} nor the tokenizer has an "
            f"{_KEY}; add one to {GENERATION_FILE} (from Python: pass stop_ids)"
        )
    return tuple(dict.fromkeys(found))


def generation_settings(directory: str | Path, stop_ids: Sequence[int]) -> dict[str, Any] | None:
    """Returns the generation_config.json of a model with `stop_ids` in addition to its base's.

    Where the base has no such file, transformers takes the ids in config.json; the new file then
    has these too.

    Args:
        directory: Folder of the base checkpoint.
        stop_ids: From `stop_token_ids`.

    Returns:
        Its contents, all other fields unchanged; None if the base's own files have the same ids.
    """
    path = Path(directory) / GENERATION_FILE
    fallback = Path(directory) / CONFIG_FILE
    source = path if path.exists() else fallback
    settings = read_json(source)
    before = dict.fromkeys(_token_ids(settings, source))
    ids = list(before | dict.fromkeys(stop_ids))
    if ids == list(before):
        return None
    if source == fallback:
        names = ("bos_token_id", "pad_token_id")
        settings = {name: settings[name] for name in names if settings.get(name) is not None}
    return settings | {_KEY: ids[0] if len(ids) == 1 else ids}


def write_stop_tokens(folder: Path, stop_ids: Sequence[int], tokenizer: Any) -> None:
    """Writes the stop tokens of a run's model to its folder."""
    names = tokenizer.convert_ids_to_tokens(list(stop_ids))
    text = json.dumps({_KEY: list(stop_ids), "tokens": names}, ensure_ascii=False)
    (folder / STOP_TOKENS_FILE).write_text(text + "\n", encoding="utf-8")


def read_stop_tokens(folder: Path) -> tuple[int, ...] | None:
    """Returns the recorded stop tokens, or None for a run of an older version of lorax.

    Raises:
        CheckpointError: If the file is damaged, or lacks them.
    """
    path = folder / STOP_TOKENS_FILE
    if not path.exists():
        return None
    settings = read_json(path)
    if settings.get(_KEY) is None:
        found = "is null" if _KEY in settings else "is missing"
        raise CheckpointError(
            f'{path}: {_KEY} {found}: write the ids of the tokens that end a text, {{"{_KEY}": '
            "[ID]}, or remove the file, and only the base model's are known"
        )
    return tuple(_token_ids(settings, path, instead="the file"))


def _token_ids(settings: dict[str, Any], path: Path, instead: str = "the key") -> list[int]:
    value = settings.get(_KEY)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        whole = isinstance(token, int) and not isinstance(token, bool)
        if not (whole and 0 <= token < 2**31):
            shown = repr(token) if whole else type(token).__name__
            raise CheckpointError(
                f"{path}: {_KEY} must be a token id, which is 0 to {2**31 - 1}, or a list of them, "
                f"got {shown[:40]}; write the id of the token that ends a text, or remove {instead}"
            )
    return ids
