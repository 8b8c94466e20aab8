"""The identity of a run: settings and fingerprints that a resumed run must share."""

import hashlib
import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lorax.config.marks import find_marks
from lorax.config.run import RunConfig
from lorax.data.dataset import EncodedDataset
from lorax.recovery.snapshots import WEIGHTS_FOLDER

_LENGTH = ("train.num_train_epochs", "train.max_steps")


class Identity:
    """The identity of a run, collected part by part.

    When a run is resumed, each part is compared once with its newest checkpoint.

    Args:
        manifest: The manifest of that checkpoint; None where there is none, or where it is read
            only when all parts are known.
        where: The run's folder, for errors.
        settings_of: As for `refuse_other_run`.

    Attributes:
        parts: The parts known so far, by name; a checkpoint keeps them.
        manifest: The argument.
    """

    def __init__(
        self,
        manifest: Mapping[str, Any] | None = None,
        where: str = "",
        settings_of: Callable[[str], str] = str,
    ):
        self.manifest = manifest
        self.parts = dict[str, Any]()
        self._where = where
        self._settings_of = settings_of
        self._left = dict(self.saved)

    @property
    def saved(self) -> Mapping[str, Any]:
        """The parts in the checkpoint; empty without one."""
        return {} if self.manifest is None else self.manifest["record"]["identity"]

    def add(self, parts: Mapping[str, Any]) -> None:
        """Adds parts of the run, None for one that it lacks.

        Raises:
            ValueError: If the run cannot be resumed with them, naming all that differ.
        """
        self.parts |= {name: part for name, part in parts.items() if part is not None}
        if self.manifest is not None:
            self._compare({n: self._left.pop(n) for n in parts if n in self._left}, parts)

    def go_on_from(self, record: Mapping[str, Any]) -> None:
        """Compares the remaining parts, once all are known and the checkpoint is restored.

        Args:
            record: The checkpoint's record; it may be older than the newest one.

        Raises:
            ValueError: If it is another run's.
        """
        if self.manifest is None or record["identity"] != self.saved:
            self._compare(record["identity"], self.parts)
        else:
            self._compare(self._left, {})

    def _compare(self, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        refuse_other_run(saved, now, self._where, self._settings_of)


def identify_rows(
    train: EncodedDataset, held_out: EncodedDataset | None = None
) -> dict[str, str | None]:
    """Returns the fingerprints of the rows of a run, by the names that messages use."""
    held = None if held_out is None else fingerprint_data(held_out)
    return {"training data": fingerprint_data(train), "held-out data": held}


def fixed_settings(config: RunConfig) -> dict[str, Any]:
    """Returns the settings that a resumed run must share, by dotted name."""
    return _fixed(dict(_flatten(config.model_dump(mode="json"))))


def _fixed(settings: Mapping[str, Any]) -> dict[str, Any]:
    # Saved settings too: an older version may have saved some that no longer matter.
    may_differ = {name for name, mark in find_marks(RunConfig).items() if not mark.stays}
    return {k: v for k, v in settings.items() if _section_key(k) not in may_differ}


def refuse_other_run(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    where: str,
    settings_of: Callable[[str], str],
) -> None:
    """Raises `ValueError` naming every setting and every other thing that differs.

    Args:
        saved: Parts of the saved `Identity`.
        now: The same parts today, or more.
        where: The run's folder.
        settings_of: Returns the settings that request a recomputation.
    """
    before = _fixed(saved.get("settings", {}))
    after = _fixed(now.get("settings", {}))
    differing = [
        f"{key} was {_show(before, key)} and is {_show(after, key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not (key not in before and _is_default(key, after))
    ]
    others = sorted((saved.keys() | now.keys()) - {"settings"})
    for name in others:
        if saved.get(name) != now.get(name):
            plain = name in ("devices", "gradient checkpointing")
            got = f": {saved.get(name)} then, {now.get(name)} now" if plain else ""
            if name == "gradient checkpointing" and isinstance(was := saved.get(name), str):
                got += f" (go on with {settings_of(was)})"
            differing.append(f"the {name} changed{got}")
    if differing:
        raise ValueError(
            f"{where} cannot be resumed as another run: {'; '.join(differing)}. "
            f"{_explain_ways(where, before, after)}"
        )


def _explain_ways(where: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Returns what to do with a run that is asked to be another one."""
    saved = sorted((Path(where) / WEIGHTS_FOLDER).glob("step-*"))
    begins = "begin another run: save.output_dir=FOLDER"
    if saved:
        key = "model.name_or_path" if after.get("train.method") == "full" else "model.adapter"
        lora = "" if key == "model.name_or_path" else "lora=null "
        newest = shlex.quote(str(saved[-1]))
        begins += f", and {lora}{key}={newest} for this one's weights"
    if any(before.get(key) != after.get(key) for key in _LENGTH):
        return (
            "A run keeps its length, which its learning rates depend on. To train longer, "
            f"{begins}. Or undo the change"
        )
    return f"Undo the change, or {begins}"


def _is_default(key: str, settings: Mapping[str, Any]) -> bool:
    """Says whether a setting that an older version lacked has its default value."""
    section, _, name = key.partition(".")
    fields = getattr(RunConfig.model_fields[section].annotation, "model_fields", {})
    return key in settings and name in fields and fields[name].default == settings[key]


def _show(settings: Mapping[str, Any], key: str) -> str:
    return json.dumps(settings[key]) if key in settings else "not there"


def _section_key(key: str) -> str:
    return ".".join(key.split(".")[:2])


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flatten(inner, f"{path}.{name}" if path else name)
    else:
        yield path, value


def fingerprint_data(data: EncodedDataset) -> str:
    """Returns the SHA-256 of encoded rows: of every token, mask and row boundary."""
    digest = hashlib.sha256()
    for array in (data.tokens, data.supervised, data.offsets):
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


def fingerprint_weights(weights: Any) -> str:
    """Returns a SHA-256 of names, shapes, dtypes and a corner of every array.

    A run that knows its base model's files has `fingerprint_folder` of them instead.
    """
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(weights)
    corners = jax.device_get([leaf[(slice(8),) * leaf.ndim] for _, leaf in leaves])
    for (path, leaf), corner in zip(leaves, corners, strict=True):
        name = jax.tree_util.keystr(path)
        digest.update(f"{name}{leaf.shape}{leaf.dtype}".encode() + corner.tobytes())
    return digest.hexdigest()


def fingerprint_file(path: Path, *, samples: int = 64, sample_bytes: int = 2**16) -> str:
    """Returns a SHA-256 of a file's size, its first MiB, and samples spread over the rest.

    A file of up to 5 MiB is read whole. Larger ones are not: to read weights of many GiB takes
    longer than the rest of a start.
    """
    size = path.stat().st_size
    head = 2**20
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(head))
        if size <= head + samples * sample_bytes:
            digest.update(file.read())
            return digest.hexdigest()
        for index in range(samples):
            file.seek(head + (size - head - sample_bytes) * index // (samples - 1))
            digest.update(file.read(sample_bytes))
    return digest.hexdigest()


def fingerprint_folder(folder: Path, patterns: tuple[str, ...]) -> str:
    """Returns a SHA-256 of the files of a folder that match, by name."""
    digest = hashlib.sha256()
    for path in sorted({p for pattern in patterns for p in folder.glob(pattern)}):
        if path.is_file():
            digest.update(f"{path.name}\0{fingerprint_file(path)}\0".encode())
    return digest.hexdigest()
