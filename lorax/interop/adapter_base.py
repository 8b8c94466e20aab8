"""The base model of an adapter: the recorded one, unless an option names another."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from lorax.config.run import RunConfig
from lorax.interop.folder import CheckpointError, resolve_checkpoint
from lorax.interop.peft_config import AdapterError, read_base_name


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """A model by its folder or hub id, and on the hub by its branch, tag or commit too."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name} at revision {self.revision}"


def recorded_base(adapter: str | Path) -> BaseModel | None:
    """Returns the base model recorded in an adapter's folder, or None if none is.

    Raises:
        ValueError: If adapter_config.json is absent or damaged; with the file and the field.
    """
    name, revision = read_base_name(adapter)
    return BaseModel(name, revision) if name else None


def choose_base(
    recorded: BaseModel | None,
    where: str | Path,
    *,
    name: str | None = None,
    revision: str | None = None,
    tell: Callable[[str], object],
) -> BaseModel:
    """Returns the base model of an adapter.

    Args:
        recorded: The recorded base, if there is one.
        where: The file that records it.
        name: The requested base; None is the recorded one.
        revision: The requested revision; None is the recorded one, if the base is too.
        tell: Called with a line where the request differs from the record.

    Raises:
        ValueError: If none is requested and none recorded.
    """
    if recorded is None:
        if name is None:
            raise AdapterError(f"{where} names no base model: pass --base")
        return BaseModel(name, revision)
    same = name is None or _is_same(name, recorded.name)
    inherited = recorded.revision if same else None
    chosen = BaseModel(name or recorded.name, revision or inherited)
    if revision is None and inherited is not None and Path(chosen.name).expanduser().is_dir():
        tell(f"{where} names revision {inherited} of {chosen.name}, a folder, which has none")
        return BaseModel(chosen.name)
    if not same or chosen.revision != recorded.revision:
        tell(f"the base is {chosen}, as asked; {where} names {recorded}")
    return chosen


def resolve_recorded(base: BaseModel, where: str | Path, remedy: str) -> Path:
    """Returns the folder of a base that a file records, fetching it if needed.

    Args:
        base: The base.
        where: The file that records it.
        remedy: How to name another folder, for the error.

    Raises:
        CheckpointError: As `resolve_checkpoint`, with the remedy.
    """
    try:
        return resolve_checkpoint(base.name, base.revision, key=str(where))
    except CheckpointError as error:
        raise CheckpointError(f"{error}. If the base lies elsewhere, {remedy}") from error


def with_recorded_revision(config: RunConfig, tell: Callable[[str], object]) -> RunConfig:
    """Returns a run's settings with the revision recorded in `model.adapter`.

    It is used where the settings name the same base on the hub and no revision.
    """
    model = config.model
    if model.adapter is None or model.revision is not None:
        return config
    recorded = recorded_base(model.adapter)
    if recorded is None or recorded.revision is None or recorded.name != model.name_or_path:
        return config
    if Path(model.name_or_path).expanduser().is_dir():
        return config
    tell(f"model.revision: {recorded.revision}, which {model.adapter} was made for")
    return config.model_copy(
        update={"model": model.model_copy(update={"revision": recorded.revision})}
    )


def _is_same(name: str, other: str) -> bool:
    here = Path(name).expanduser()
    there = Path(other).expanduser()
    return name == other or (here.is_dir() and there.is_dir() and here.samefile(there))
