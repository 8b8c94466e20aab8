"""`lorax export`: the adapter of a run, or any PEFT adapter, in another format, verified."""

from pathlib import Path

import jax.numpy as jnp
from rich.console import Console

from lorax.adapters.initial import initialisation
from lorax.adapters.nnx.merge import with_starts
from lorax.cli.common import DTYPES, base_format, note
from lorax.config.adapter import EVA
from lorax.interop.adapter_base import BaseModel, choose_base, recorded_base, resolve_recorded
from lorax.interop.adapter_tokenizer import FoundTokenizer, find_tokenizer, tokenizer_files
from lorax.interop.export import WHOLE_MODELS, export_model
from lorax.interop.folder import expand, resolve_checkpoint
from lorax.interop.load import find_stored_dtype, load_hf_config, load_model
from lorax.interop.new_tokens import NewTokens
from lorax.interop.peft import load_adapter
from lorax.interop.peft_config import CONFIG_FILE, AdapterError, read_adapter_config
from lorax.interop.stop_tokens import stop_token_ids
from lorax.report.card import write_card
from lorax.report.lines import print_line
from lorax.runs.folder import EXPORT_FOLDERS, SavedRun, find_adapter, read_run, run_of
from lorax.runs.setup import input_notes
from lorax.system.files import refuse_occupied


def add_export(add) -> None:
    """Adds the command, by a function that makes one of its name, action and description."""
    command = add("export", _export, "Export a run's adapter in another format, and verify it.")
    command.add_argument("source", metavar="RUN", help="the folder of a run, or of a PEFT adapter")
    command.add_argument(
        "--format",
        choices=tuple(EXPORT_FOLDERS),
        required=True,
        help="peft: an adapter as it was trained; peft-portable: of one rank, its scale within B; "
        "merged: a whole model; rebased: of PiSSA and OLoRA, the changed base and the adapter of "
        "rank r on it (needed)",
    )
    command.add_argument("--out", required=True, help="a folder that does not exist yet (needed)")
    command.add_argument("--base", help="the base model (default: the one that RUN names)")
    command.add_argument("--revision", help="of the base (default: the one that RUN names)")
    command.add_argument(
        "--dtype", choices=DTYPES, help="of the base's weights (default: the run's, or the base's)"
    )


def _export(parsed, console: Console) -> None:
    refuse_occupied(parsed.out)
    source = expand(parsed.source)
    tell = note("export")
    run = read_run(source)
    if run is not None and run.config.train.method == "full":
        raise ValueError(f"{source} trained the whole model: {source / 'merged'} is its checkpoint")
    adapter = run.adapter if run is not None else find_adapter(source)
    name, where = _recorded(run, adapter)
    chosen = choose_base(name, where, name=parsed.base, revision=parsed.revision, tell=tell)
    # An adapter that lies where a run wrote it is still the run's, with its template and its stops.
    owner = run or run_of(adapter)
    if parsed.format == "rebased":
        _refuse_rebased(adapter, owner)
    if parsed.format in WHOLE_MODELS and owner is not None:
        _tell_owner(owner, run, tell)
    if parsed.base:
        base = resolve_checkpoint(chosen.name, chosen.revision, key="--base")
    else:
        base = resolve_recorded(chosen, where, "pass its folder with --base")
    for text in input_notes(load_hf_config(base), str(adapter), trains=False):
        tell(text)
    found = _find_tokenizer(parsed.format, base, adapter, owner, tell)
    dtype = jnp.dtype(parsed.dtype or (run.config.model.dtype if run else find_stored_dtype(base)))
    new_tokens = NewTokens.read(adapter)
    stored = load_model(base, dtype=dtype, format=base_format(owner))
    rows = new_tokens.rows_to_add(stored.config)
    model = load_adapter(new_tokens.resize(stored), adapter)
    del stored
    if owner is not None:
        tied = model.config.tie_word_embeddings
        model = with_starts(model, new_tokens.trained_by(owner.config.lora, tied))
    verified = export_model(
        model,
        parsed.out,
        parsed.format,
        base=base,
        base_name=chosen.name,
        base_revision=chosen.revision,
        card=write_card(run.config, parsed.format, {}, rows=rows) if run else None,
        new_tokens=new_tokens,
        chat_template=owner.chat_template if owner else found and found.chat_template,
        stop_ids=owner.stop_ids if owner else _own_stops(base, found),
        tokenizer=found and found.tokenizer,
        tokenizer_folder=found and found.folder,
    )
    print_line(console, f"{parsed.format}: {parsed.out} (base in {dtype.name})")
    print_line(console, f"verified: {verified.describe()}")


def _refuse_rebased(adapter: Path, owner: SavedRun | None) -> None:
    """Refuses an adapter of which no file says that it began with a part of the base.

    Raises:
        AdapterError: With the reason and what to do.
    """
    starts = [read_adapter_config(adapter).init_lora_weights]
    starts += [owner.config.lora.init_lora_weights] if owner else []
    if not any(start not in (True, EVA) and initialisation(start).changes_base for start in starts):
        where = owner.folder / "config.yaml" if owner else adapter / CONFIG_FILE
        raise AdapterError(
            f"{where}: init_lora_weights is no pissa and no olora, so rebased, a base without what "
            "the adapter began with, would be the base as it is: take --format peft, or give the "
            "run that trained it"
        )


def _recorded(run: SavedRun | None, adapter: Path) -> tuple[BaseModel | None, Path]:
    """Returns the base that an adapter was made for, and the file that names it."""
    if run is None:
        return recorded_base(adapter), adapter / CONFIG_FILE
    model = run.config.model  # older versions did not write the revision into the adapter
    return BaseModel(model.name_or_path, model.revision), run.folder / "config.yaml"


def _find_tokenizer(
    format: str, base: Path, adapter: Path, owner: SavedRun | None, tell
) -> FoundTokenizer | None:
    """Returns the tokenizer that goes with a whole model; None if none goes with the export."""
    if format in WHOLE_MODELS:
        return find_tokenizer(base, adapter, run=owner.folder if owner else None, tell=tell)
    if NewTokens.read(adapter).tokens:
        return find_tokenizer(base, adapter, tell=tell)  # which is exported with the adapter
    if names := tokenizer_files(adapter):
        tell(f"{', '.join(names)} of {adapter} are not copied: an adapter is exported without them")
    return None


def _own_stops(base: Path, found: FoundTokenizer | None) -> tuple[int, ...] | None:
    """Returns what an adapter with a tokenizer of its own stops with; None if it has none."""
    if found is None or not found.is_own:
        return None
    return stop_token_ids(base, found.tokenizer, needed=False)


def _tell_owner(owner: SavedRun, run: SavedRun | None, tell) -> None:
    if run is None:
        tell(f"the chat template and stop tokens are those of the run in {owner.folder}")
    if missing := owner.missing_record():
        tell(missing)
