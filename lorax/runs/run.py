"""A whole run, from a config to verified exports; what the commands do, for Python too."""

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from lorax.config.run import RunConfig
from lorax.devices.step_cache import ProgramCache, open_program_cache
from lorax.devices.xla_cache import use_compilation_cache
from lorax.interop.adapter_base import with_recorded_revision
from lorax.interop.export_files import companion_files
from lorax.models.stack.recompute import Recomputation, settings_of
from lorax.recovery.identity import Identity, fixed_settings
from lorax.report.advice import advise, tokenizer_notes
from lorax.report.card import title_of
from lorax.report.lines import print_line
from lorax.report.listener import Recorder
from lorax.report.log import METRICS_FILE, RunLog, check_reporters, read_metrics
from lorax.report.overview import (
    report_course,
    report_data,
    report_model,
    report_notes,
    shows_text,
)
from lorax.report.progress import show_progress
from lorax.report.screen import RunSummary, print_config, print_summary
from lorax.runs.checks import check_targets, check_weights
from lorax.runs.eva import begin_on, needs_batches, note_ranks, saved_ranks
from lorax.runs.exports import draw_curve, export_all, score_model
from lorax.runs.folder import (
    SUMMARY_FILE,
    Resume,
    date_of_run,
    find_run,
    keep_date,
    record_run,
)
from lorax.runs.memory import disk_explained, memory_explained, saved_manifest
from lorax.runs.model import Blueprint, adapt_base
from lorax.runs.setup import Setup, identify_base, input_notes
from lorax.system.clock import Phases
from lorax.system.files import read_json, write_file
from lorax.system.hardware import memory_gib
from lorax.system.signals import StopRequest
from lorax.system.threads import finish_in_background, in_background
from lorax.system.versions import library_versions
from lorax.training.ahead import compile_ahead
from lorax.training.events import Event
from lorax.training.trainer import Listener, Trainer


def run_training(
    config: RunConfig,
    console: Console,
    phases: Phases | None = None,
    *,
    resume: Resume = "never",
    stop: StopRequest | None = None,
    verbose: bool = True,
) -> RunSummary:
    """Trains as `config` says, exports, verifies the exports, and reports.

    Everything that can be checked is checked before the run directory is made: settings, data,
    targets, the checkpoint. Afterwards the directory holds config.yaml, versions.json,
    metrics.jsonl, loss.png, the weights of some steps, checkpoints, the exports and summary.json.

    Args:
        config: The run's settings.
        console: Where it reports.
        phases: The time up to now, if it belongs to the run.
        resume: `always` goes on with the run in `save.output_dir`, bit for bit as if it had never
            stopped; `auto` does so if there is one, and else begins; `never` begins.
        stop: Hears the signals that ask the run to stop while it trains.
        verbose: Whether all settings are shown, or those that differ from their defaults.

    Raises:
        ValueError: Naming what cannot be used and what to do.
        RunStopped: If a signal asked the run to stop, after saving.
        SaveError: If the disk is full or cannot be written.
    """
    with memory_explained(config), disk_explained(config):
        config = with_recorded_revision(config, _teller(console))
        return _run(config, console, phases or Phases(), resume, stop, verbose)


def _run(
    config: RunConfig,
    console: Console,
    phases: Phases,
    resume: Resume,
    stop: StopRequest | None,
    verbose: bool,
) -> RunSummary:
    started = time.monotonic()
    output = Path(config.save.output_dir)
    resumed = find_run(output, resume)
    config, identity = _look_back(config) if resumed else (config, Identity(where=str(output)))
    identity.add({"settings": fixed_settings(config)})
    if resumed and (ended := output / SUMMARY_FILE).is_file():
        return _show_ended(console, output, RunSummary.read(read_json(ended), str(ended)))
    _check_reports(config, output, resumed)
    blueprint = Blueprint.of(config, saved_ranks(identity))
    check_weights(blueprint)
    console.rule("Settings")
    print_config(console, config, verbose=verbose)
    data = in_background("data", lambda: Setup.of(blueprint, identity))  # while the device starts
    programs = _open_caches(console)
    report_notes(console, input_notes(blueprint.architecture, config.model.adapter))
    shapes = check_targets(blueprint)
    _ = blueprint.mesh  # found before two threads ask for it
    files = in_background("files", blueprint.fetch)
    base = in_background("weights", lambda: blueprint.load(files.result()))  # which need no data
    setup = data.result()
    _report(setup, console)
    identity.add(setup.identify() | ({} if blueprint.is_on_hub else identify_base(files.result())))
    phases.end("data and device")
    setup.recomputation[0].put_on(shapes)
    left = _has_steps_left(identity, setup) and not needs_batches(blueprint)
    compiled = compile_ahead(shapes, setup.course, programs=programs) if left else None
    if blueprint.is_on_hub:  # the compiler has work while they come
        identity.add(identify_base(files.result()))
    model = adapt_base(base.result(), blueprint, setup.recomputation[0], begin_on(setup))
    del base
    phases.end("weights")
    report_model(console, setup.config, model)
    recorder = Recorder(console, config.log.logging_steps, phases, config.save.on_save_error)
    trainer = Trainer(
        model,
        setup.config,
        setup.train,
        setup.eval,
        listeners=(recorder, _keep_after_a_step(programs)),
        compiled=compiled,
        resume=resumed,
        course=setup.course,
        identity=identity,
        save_options=_companions(setup),
        stop=stop,
    )
    del model
    summary = _score_and_train(trainer, recorder, setup, compiled, started)
    finish_in_background("keep")
    console.rule("Result")
    print_summary(console, summary)
    return summary


def _show_ended(console: Console, output: Path, summary: RunSummary) -> RunSummary:
    """Shows what a run came to that has nothing left to do."""
    print_line(console, f"{output}: this run has ended, nothing is left to train; it came to")
    print_summary(console, summary)
    return summary


def _has_steps_left(identity: Identity, setup: Setup) -> bool:
    """Says whether a run has steps to train, by the newest checkpoint if it goes on from one."""
    if identity.manifest is None:
        return True
    progress = identity.manifest["record"]["progress"]
    return progress["step"] < setup.course.total_steps and not progress["stopped_early"]


def _check_reports(config: RunConfig, output: Path, resumed: bool) -> None:
    """Raises what must not wait for the run's end: of reporters, and of a log that goes on."""
    check_reporters(config.log.report_to)
    if resumed and "jsonl" in config.log.report_to and (output / METRICS_FILE).exists():
        read_metrics(output / METRICS_FILE)


def _look_back(config: RunConfig) -> tuple[RunConfig, Identity]:
    """Returns the settings of a run that goes on, with its date, and what it was before."""
    config = keep_date(config, date_of_run(config))
    where = str(Path(config.save.output_dir))
    return config, Identity(saved_manifest(config), where, settings_of)


def _teller(console: Console) -> Callable[[str], None]:
    return functools.partial(print_line, console)


def _open_caches(console: Console) -> ProgramCache | None:
    """Has compiled programs kept, where compiling takes long."""
    if jax.default_backend() != "gpu":
        return None
    tell = _teller(console)
    tell(use_compilation_cache()[1])
    return open_program_cache(tell)


def _report(setup: Setup, console: Console) -> None:
    """Shows the rows, once it is known that they make steps, and what is recomputed."""
    course = setup.course
    console.rule("Data")
    rows = 1 if shows_text(console) else 0
    context = setup.blueprint.architecture.context
    report_data(console, setup.config, setup.datasets, setup.tokenizer, rows, context=context)
    report_notes(console, tokenizer_notes(setup.datasets, setup.tokenizer))
    if not rows:
        print_line(console, "no row is shown in a log; `lorax inspect` shows some")
    report_course(console, course)
    console.rule("Model")
    recomputation, reason = setup.recomputation
    print_line(console, f"gradient checkpointing: {recomputation}; {reason}")


def _companions(setup: Setup) -> dict[str, Any]:
    """Returns the options with which the trainer writes weights, for the files beside them."""
    files = companion_files(
        setup.blueprint.folder,
        chat_template=setup.chat_template,
        stop_ids=setup.stop_ids,
        card=None,
        tokenizer=setup.tokenizer,
    )
    new = setup.blueprint.new_tokens
    folder = setup.blueprint.folder
    if setup.config.train.method != "full":
        return {"files": new.adapter_files(folder, files)}
    return {"source_directory": folder, "files": files | new.tokenizer_file(folder)}


def _keep_after_a_step(programs: ProgramCache | None) -> Listener:
    """Returns what has compiled steps kept, but not before the first step, which would wait."""

    def listen(event: Event) -> None:
        if programs is not None and "loss" in event:
            programs.keep_waiting()

    return listen


def _score_and_train(
    trainer: Trainer, recorder: Recorder, setup: Setup, compiled: Future[Any] | None, started: float
) -> RunSummary:
    phases = recorder.phases
    # The exports belong to the run, so its lock is held until they are done, or have failed.
    with contextlib.closing(trainer.checkpoints):
        trainer.keeps_lock = True
        if trainer.progress.step == 0:
            note_ranks(trainer.progress, setup.config, trainer.model)
            before = score_model(setup, trainer.model, recorder.console, "before training")
            trainer.progress.notes["exact match"] = before
        phases.end("first answers" if setup.config.eval.exact_match else "trainer")
        if compiled is not None and compiled.done():
            compiled.result()  # raises what the compiler raised, before anything is written
        return _train_and_export(trainer, recorder, setup, started)


def _train_and_export(
    trainer: Trainer, recorder: Recorder, setup: Setup, started: float
) -> RunSummary:
    config = trainer.config
    console = recorder.console
    output = trainer.output_dir
    before = trainer.progress.notes.get("exact match")
    trainer.checkpoints.open()
    record_run(
        output,
        config,
        chat_template=setup.chat_template,
        stop_ids=setup.stop_ids,
        row_kinds=setup.train.report.kinds,
        tokenizer=setup.tokenizer,
        versions=library_versions(),
    )
    console.rule("Training")
    reached = trainer.progress.step
    settled = trainer.progress.settled
    evaluated = 0 < reached <= settled
    with RunLog(output, config.log.report_to, reached=reached, evaluated=evaluated) as log:
        recorder.log = log
        with show_progress(console, trainer.total_steps, reached=reached) as show:
            recorder.show = show
            result = trainer.train()
    after = score_model(setup, trainer.model, console, "after training")
    console.rule("Export")
    files = export_all(setup, trainer.model, console, result, (before, after))
    if "jsonl" in config.log.report_to:
        files |= draw_curve(output, title_of(config), console)
    files |= {"run": str(output)}
    memory = memory_gib()
    speed = trainer.throughput.mean()
    summary = RunSummary(
        steps=result.steps,
        seconds=time.monotonic() - started,
        tokens_per_s=speed["tokens_per_s"],
        mfu=speed["mfu"],
        memory_gib=memory.gib,
        memory_source=memory.source,
        loss=(result.eval_loss_before, result.eval_loss),
        exact_match=(before, after),
        files=files,
        gradient_checkpointing=str(Recomputation.of(trainer.model)),
        advice=advise(config, output, setup.blueprint.architecture),
    )
    text = json.dumps(dataclasses.asdict(summary), indent=2)
    write_file(output / SUMMARY_FILE, text + "\n")
    return summary
