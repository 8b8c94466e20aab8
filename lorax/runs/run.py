"""A whole run, from a config to verified exports; what the commands do, for Python too."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path

import jax
from rich.console import Console

from lorax.config.run import RunConfig
from lorax.devices.mesh import make_mesh
from lorax.devices.step_cache import ProgramCache, open_program_cache
from lorax.devices.xla_cache import use_compilation_cache
from lorax.interop.adapter_base import with_recorded_revision
from lorax.interop.export_files import companion_files
from lorax.interop.folder import resolve_base
from lorax.models.stack.recompute import Recomputation, settings_of
from lorax.recovery.identity import (
    fingerprint_folder,
    fixed_settings,
    identify_run,
    name_datasets,
    refuse_other_run,
)
from lorax.report.card import title_of
from lorax.report.listener import Recorder
from lorax.report.log import METRICS_FILE, RunLog, check_reporters, read_metrics
from lorax.report.overview import report_data, report_model, report_notes, shows_text
from lorax.report.screen import RunSummary, print_config, print_summary, show_progress
from lorax.runs.checks import check_plan, check_targets, check_weights
from lorax.runs.exports import draw_curve, export_all, score_model
from lorax.runs.folder import (
    SUMMARY_FILE,
    Resume,
    date_of_run,
    find_run,
    keep_date,
    record_run,
)
from lorax.runs.memory import (
    choose_recomputation,
    disk_explained,
    memory_explained,
    saved_identity,
)
from lorax.runs.model import adapt_base, load_base
from lorax.runs.setup import Inputs, input_notes, load_inputs
from lorax.system.clock import Phases
from lorax.system.files import read_json, write_file
from lorax.system.hardware import memory_gib
from lorax.system.signals import StopRequest
from lorax.system.threads import finish_beside, start_beside
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

    Raises:
        ValueError: Naming what cannot be used and what to do.
        RunStopped: If a signal asked the run to stop, after saving.
        SaveError: If the disk is full or cannot be written.
    """
    with memory_explained(config), disk_explained(config):
        tell = lambda text: console.print(text, highlight=False, soft_wrap=True)
        config = with_recorded_revision(config, tell)
        return _run(config, console, phases or Phases(), resume, stop)


def _run(
    config: RunConfig,
    console: Console,
    phases: Phases,
    resume: Resume,
    stop: StopRequest | None,
) -> RunSummary:
    started = time.monotonic()
    output = Path(config.save.output_dir)
    resumed = find_run(output, resume)
    if resumed:
        config = keep_date(config, date_of_run(config))
        refuse_changed_settings(config)
        if (ended := output / SUMMARY_FILE).is_file():
            console.print(f"{output}: this run has ended; there is nothing to resume")
            return RunSummary.read(read_json(ended), str(ended))
    check_reporters(config.log.report_to)
    if resumed and "jsonl" in config.log.report_to and (output / METRICS_FILE).exists():
        read_metrics(output / METRICS_FILE)  # what it raises must not wait for the run's end
    check_weights(config)
    console.rule("Settings")
    print_config(console, config)
    programs = None
    data = start_beside("data", lambda: load_inputs(config))  # while the device starts
    if jax.default_backend() == "gpu":
        tell = lambda text: console.print(text, highlight=False, soft_wrap=True)
        tell(use_compilation_cache()[1])
        programs = open_program_cache(tell)
    source = config.model
    folder = resolve_base(source, weights=False)
    report_notes(console, input_notes(folder, source.adapter))
    shapes = check_targets(config, folder)
    base = start_beside("weights", lambda: load_base(config))  # which need nothing of the data
    inputs = data.result()
    config = keep_date(config, inputs.date)
    check_plan(config, inputs)
    console.rule("Data")
    rows = 1 if shows_text(console) else 0
    report_data(console, config, inputs.datasets, inputs.tokenizer, rows, context=inputs.context)
    if not rows:
        console.print("no row is shown in a log; `lorax inspect` shows some", highlight=False)
    console.rule("Model")
    recomputation, reason = choose_recomputation(config)
    console.print(
        f"gradient checkpointing: {recomputation}; {reason}", highlight=False, soft_wrap=True
    )
    files = fingerprint_inputs(config, inputs)
    if resumed:
        refuse_changes(config, inputs, recomputation, files)
    phases.end("data and device")
    recomputation.put_on(shapes)
    datasets = inputs.train, inputs.eval
    compiled = compile_ahead(shapes, config, *datasets, programs=programs)
    model = adapt_base(base.result(), config, recomputation)
    del base
    phases.end("weights")
    report_model(console, config, model)
    on_error = config.save.on_save_error
    recorder = Recorder(console, config.log.logging_steps, phases, on_error)
    trainer = Trainer(
        model,
        config,
        *datasets,
        listeners=(recorder, _keep_after_a_step(programs)),
        compiled=compiled,
        resume=resumed,
        files=files,
        stop=stop,
    )
    del model
    trainer.beside["files"] = companion_files(
        inputs.base,
        chat_template=inputs.chat_template,
        stop_ids=inputs.stop_ids(needed=False),
        card=None,
        tokenizer=inputs.tokenizer,
    )
    # The exports belong to the run, so its lock is held until they are done, or have failed.
    with contextlib.closing(trainer.checkpoints):
        trainer.keeps_lock = True
        if trainer.progress.step == 0:
            before = score_model(config, trainer.model, inputs, console, "before training")
            trainer.progress.notes["exact match"] = before
        phases.end("first answers" if config.eval.exact_match else "trainer")
        if compiled.done():
            compiled.result()  # raises what the compiler raised, before anything is written
        summary = _train_and_export(trainer, recorder, inputs, started)
    finish_beside("keep")
    console.rule("Result")
    print_summary(console, summary)
    return summary


def _keep_after_a_step(programs: ProgramCache | None) -> Listener:
    """Returns what has compiled steps kept, but not before the first step, which would wait."""

    def listen(event: Event) -> None:
        if programs is not None and "loss" in event:
            programs.keep_waiting()

    return listen


def _train_and_export(
    trainer: Trainer, recorder: Recorder, inputs: Inputs, started: float
) -> RunSummary:
    config, console = trainer.config, recorder.console
    output, before = trainer.output_dir, trainer.progress.notes.get("exact match")
    trainer.checkpoints.open()
    record_run(
        output,
        config,
        chat_template=inputs.chat_template,
        stop_ids=inputs.stop_ids(needed=False),
        row_kinds=inputs.train.report.kinds,
        tokenizer=inputs.tokenizer,
        versions=library_versions(),
    )
    console.rule("Training")
    reached, settled = trainer.progress.step, trainer.progress.settled
    evaluated = 0 < reached <= settled
    with RunLog(output, config.log.report_to, reached=reached, evaluated=evaluated) as log:
        recorder.log = log
        with show_progress(console, trainer.total_steps) as show:
            recorder.show = show
            result = trainer.train()
    after = score_model(config, trainer.model, inputs, console, "after training")
    console.rule("Export")
    files = export_all(config, trainer.model, inputs, console, result, (before, after))
    if "jsonl" in config.log.report_to:
        files |= draw_curve(output, title_of(config), console)
    files |= {"run": str(output)}
    memory, speed = memory_gib(), trainer.throughput.mean()
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
    )
    text = json.dumps(dataclasses.asdict(summary), indent=2)
    write_file(output / SUMMARY_FILE, text + "\n")
    return summary


def fingerprint_inputs(config: RunConfig, inputs: Inputs) -> dict[str, str]:
    """Returns fingerprints of what a run reads besides its rows."""
    base = resolve_base(config.model)
    found = {
        "base model": fingerprint_folder(
            base, ("*.safetensors", "*.safetensors.index.json", "config.json")
        ),
        "tokenizer": fingerprint_folder(
            inputs.base, ("tokenizer*", "chat_template*", "special_tokens_map.json")
        ),
    }
    if config.model.adapter is not None:
        found["adapter"] = fingerprint_folder(Path(config.model.adapter), ("adapter_*",))
    return found


def refuse_changed_settings(config: RunConfig) -> None:
    """Refuses to resume with other settings, before anything else is read."""
    identity = saved_identity(config)
    if identity is not None:
        saved, now = {"settings": identity["settings"]}, {"settings": fixed_settings(config)}
        refuse_other_run(saved, now, str(Path(config.save.output_dir)), settings_of)


def refuse_changes(
    config: RunConfig, inputs: Inputs, recomputation: Recomputation, files: Mapping[str, str]
) -> None:
    """Refuses to resume another run, before its steps are compiled; the trainer looks again."""
    identity = saved_identity(config)
    if identity is None:
        return
    data = name_datasets(inputs.train, inputs.eval)
    devices = make_mesh(config.mesh.data).size
    now = identify_run(config, data, devices, str(recomputation), files)
    # The trainer knows how the model is adapted; this is about the rest.
    saved = {k: v for k, v in identity.items() if k != "adapter settings"}
    refuse_other_run(saved, now, str(Path(config.save.output_dir)), settings_of)
