"""A run's folder: what a run records of itself there, and what later commands read of it."""

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lorax.config.run import RunConfig, dump_config, load_config
from lorax.data.reading.formats import ROW_KINDS, RowKind
from lorax.interop.peft_config import CONFIG_FILE as ADAPTER_FILE
from lorax.interop.stop_tokens import STOP_TOKENS_FILE, read_stop_tokens, write_stop_tokens
from lorax.recovery.snapshots import WEIGHTS_FOLDER
from lorax.recovery.store import CHECKPOINT_FOLDER, MARKER_FILE
from lorax.system.files import CheckpointError, read_json, refuse_occupied
from lorax.system.special_files import refuse_special_files
from lorax.system.wording import clip, explain, show

CONFIG_FILE = "config.yaml"
VERSIONS_FILE = "versions.json"
SUMMARY_FILE = "summary.json"

CHAT_TEMPLATE_FILE = "chat_template.jinja"
"""In a run's folder: the template it was trained with, where that is not the tokenizer's own."""

ROW_KINDS_FILE = "row_kinds.json"
"""In a run's folder: what the rows were made of that it was trained on."""

_KINDS = "kinds"

type Resume = Literal["never", "auto", "always"]

EXPORT_FOLDERS = {
    "peft": "adapter",
    "peft-portable": "adapter-portable",
    "merged": "merged",
    "rebased": "rebased",
}


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """The contents of a run's folder.

    Attributes:
        folder: Where it is.
        config: The run's settings.
        chat_template: Its own template; None where it is the tokenizer's.
        stop_ids: What its model stops with; None if an older version of lorax made it.
        row_kinds: What the rows were made of that it was trained on, in the order of `ROW_KINDS`;
            None if an older version of lorax made it.
    """

    folder: Path
    config: RunConfig
    chat_template: str | None
    stop_ids: tuple[int, ...] | None
    row_kinds: tuple[RowKind, ...] | None

    @property
    def adapter(self) -> Path:
        """The adapter of a run that has ended.

        Raises:
            ValueError: If it has not ended.
        """
        adapter = self.folder / EXPORT_FOLDERS["peft"]
        if adapter.is_dir():
            return adapter
        saved = sorted((self.folder / WEIGHTS_FOLDER).glob("step-*"))
        instead = ""
        if saved:
            base, then = (shlex.quote(str(n)) for n in (self.config.model.name_or_path, saved[-1]))
            instead = (
                ", or take the adapter as it was at a save: "
                f"`lorax generate {base} --adapter {then}`, "
                f"`lorax export {then} --base {base} --format merged --out FOLDER`"
            )
        raise ValueError(
            f"{self.folder} has no folder {adapter.name}: the run has not ended. Finish it with "
            f"`lorax train {self.folder / CONFIG_FILE} --resume`{instead}"
        )

    def missing_record(self) -> str | None:
        """Returns what is not known of a run of an older version; None if all is."""
        if self.stop_ids is not None:
            return None
        return (
            f"{self.folder} has no {STOP_TOKENS_FILE} (an older version made it), so only the base "
            "model's stop tokens are known. If the run's chat template ends turns with another "
            f'token, write its id into that file: {{"eos_token_id": [ID]}}'
        )

    def missing_kinds(self) -> str | None:
        """Returns what follows for a prompt where an older version recorded no rows; else None."""
        if self.row_kinds is not None:
            return None
        return (
            f"{self.folder} has no {ROW_KINDS_FILE} (an older version made it), so the prompt is "
            "put into the chat template. If the run was trained on plain text, pass --raw, or "
            f'write into that file: {{"{_KINDS}": ["text"]}}'
        )


def find_run(output: Path, resume: Resume) -> bool:
    """Says whether there is a run to go on with.

    Raises:
        CheckpointError: If the directory holds a run, or something else, and is not to be resumed,
            or is to be and holds no run, or one with more than files and folders in it; or if no
            folder can have its name.
    """
    checkpoints = output / CHECKPOINT_FOLDER
    try:
        is_run = (checkpoints / MARKER_FILE).is_file()
    except OSError as error:  # a name that is too long, or a folder that may not be looked into
        raise CheckpointError(
            f"save.output_dir: {clip(str(output))}: {explain(error)}; choose another path"
        ) from error
    if not is_run and checkpoints.is_dir() and not any(checkpoints.iterdir()):
        # What a run that was killed while it made its folder leaves: this and nothing else.
        is_run = list(output.iterdir()) == [checkpoints]
    if resume == "never" and is_run:
        raise CheckpointError(
            f"{output} holds a run: go on with --resume, or choose another save.output_dir"
        )
    if resume == "always" and not is_run:
        raise CheckpointError(f"{output} holds no run of lorax to resume{_where_else(output)}")
    if not is_run:
        try:
            refuse_occupied(output)
        except CheckpointError as error:
            raise CheckpointError(f"save.output_dir: {error}") from error
        return False
    refuse_special_files(output)
    return True


def _where_else(output: Path) -> str:
    """Returns what to do where no run was found."""
    if output.is_absolute():
        return (
            ": set save.output_dir to the folder of one, or leave out --resume to begin one there"
        )
    return (
        f" (looked for from {Path.cwd()}): if it was begun in another directory, go there and run "
        "this again, with the config's path from there; to begin one here, leave out --resume"
    )


def record_run(
    folder: Path,
    config: RunConfig,
    *,
    chat_template: str | None,
    stop_ids: Sequence[int],
    row_kinds: Sequence[RowKind],
    tokenizer: Any,
    versions: Mapping[str, str],
) -> None:
    """Writes into a run's folder, made if needed, what `read_run` reads, and the versions."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(dump_config(config), encoding="utf-8")
    if chat_template is not None:
        (folder / CHAT_TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")
    write_stop_tokens(folder, stop_ids, tokenizer)
    kinds = json.dumps({_KINDS: list(row_kinds)})
    (folder / ROW_KINDS_FILE).write_text(kinds + "\n", encoding="utf-8")
    text = json.dumps(dict(versions), indent=2)
    (folder / VERSIONS_FILE).write_text(text + "\n", encoding="utf-8")


def read_run(folder: Path) -> SavedRun | None:
    """Returns what a run's folder says, or None if it is something else.

    Raises:
        ValueError: If it is a run's and cannot be read as it stands.
    """
    if not (folder / CONFIG_FILE).exists():
        return None
    refuse_special_files(folder)
    template = folder / CHAT_TEMPLATE_FILE
    return SavedRun(
        folder,
        load_config(folder / CONFIG_FILE),
        template.read_text(encoding="utf-8") if template.is_file() else None,
        read_stop_tokens(folder),
        _read_row_kinds(folder),
    )


def _read_row_kinds(folder: Path) -> tuple[RowKind, ...] | None:
    path = folder / ROW_KINDS_FILE
    if not path.exists():
        return None
    found = read_json(path).get(_KINDS)
    given = found if isinstance(found, list) else []
    kinds: list[RowKind] = [kind for kind in ROW_KINDS if kind in given]
    if not kinds or len(kinds) < len(given):
        raise CheckpointError(
            f"{path}: {_KINDS} must be a list of {', '.join(ROW_KINDS)}, each at most once, got "
            f"{show(found)}; write there what the run was trained on, or remove the file"
        )
    return tuple(kinds)


def run_of(folder: Path) -> SavedRun | None:
    """Returns the run that wrote a folder of adapters or weights, if it lies within its own."""
    folder = folder.absolute()
    is_export = folder.name in EXPORT_FOLDERS.values()
    run = folder.parent if is_export else folder.parent.parent
    is_weights = folder.parent.name == WEIGHTS_FOLDER
    is_run = (run / CHECKPOINT_FOLDER / MARKER_FILE).is_file()
    return read_run(run) if is_run and (is_export or is_weights) else None


def find_adapter(folder: Path) -> Path:
    """Returns a PEFT adapter's folder as it was given, or says what is there instead.

    Raises:
        CheckpointError: If it is neither an adapter's folder nor a run's.
    """
    if (folder / ADAPTER_FILE).exists():
        return folder
    kinds = (
        f"a run's folder, which holds {CONFIG_FILE}, or an adapter's, which holds {ADAPTER_FILE}"
    )
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder} {found}: give {kinds}")
    inner = folder / EXPORT_FOLDERS["peft"]
    hint = f"; its adapter is in {inner}" if (inner / ADAPTER_FILE).exists() else ""
    raise CheckpointError(f"{folder} holds {list_folder(folder)}: give {kinds}{hint}")


def list_folder(folder: Path) -> str:
    """Names some of what a folder holds."""
    names = sorted(path.name for path in folder.iterdir())
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more if names else "nothing"


def keep_date(config: RunConfig, date: str | None) -> RunConfig:
    """Returns the settings of a run whose chat template is told `date`, whenever it goes on."""
    return config.model_copy(update={"data": config.data.model_copy(update={"date": date})})


def date_of_run(config: RunConfig) -> str | None:
    """Returns the day that the run in `save.output_dir` began; what is asked for if it keeps none.

    Raises:
        ValueError: If another day is asked for.
    """
    asked = config.data.date
    path = Path(config.save.output_dir) / CONFIG_FILE
    kept = load_config(path).data.date if path.is_file() else None
    if asked is not None and kept is not None and asked != kept:
        raise ValueError(
            f"data.date: {asked}, but the run in {config.save.output_dir} has the date {kept}: "
            "leave it out, or begin another run"
        )
    return kept or asked
