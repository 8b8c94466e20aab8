"""The commands: train, validate, inspect, generate, export."""

import argparse
import gc
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, override

from rich.console import Console

from lorax.cli_export import add_export
from lorax.cli_generate import add_generate
from lorax.config.run import RunConfig, load_config
from lorax.data.chat.tokenizer import WITHOUT_TORCH
from lorax.interop.adapter_base import with_recorded_revision
from lorax.recovery.store import SaveError
from lorax.report.overview import (
    module_rows,
    report_data,
    report_kernels,
    report_notes,
    report_plan,
)
from lorax.report.screen import print_config, print_modules
from lorax.runs.checks import check_plan, check_targets, check_weights
from lorax.runs.folder import find_run
from lorax.runs.memory import OutOfMemoryError, make_planner
from lorax.runs.run import run_training
from lorax.runs.setup import input_notes, load_inputs
from lorax.system.clock import Phases, process_age
from lorax.system.signals import STOPPED_STATUS, RunStopped, asking_signals, await_second
from lorax.system.streams import Outlet
from lorax.system.threads import works_beside
from lorax.system.versions import find_version
from lorax.system.wording import LONGEST, clip_words, describe
from lorax.training.long_steps import ABANDONED

WIDTH_IN_LOGS = 100


def run(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and ends the process with its exit status; see `main`."""
    WITHOUT_TORCH.set()
    gc.set_threshold(10_000)  # to trace a step of many layers makes objects by the million
    sys.stdout, sys.stderr = Outlet(sys.stdout), Outlet(sys.stderr)
    try:
        status = main(arguments)
    except Exception:
        traceback.print_exc()
        status = 1
    if works_beside() or ABANDONED.is_set():
        # Weights are still read, or a step compiled, for a run that could not begin; or a step that
        # was dropped runs, and would be waited for.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    0 is success, 2 follows an input that cannot be used, 1 a run that failed, 75 one that was asked
    to stop and can be resumed.

    Args:
        arguments: Words after ``lorax``; those of the process if not given.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parsed = _parser().parse_args(_move_resume(words))
    # Without markup: a path may hold brackets.
    console = Console(width=None if sys.stdout.isatty() else WIDTH_IN_LOGS, markup=False)
    try:
        parsed.run(parsed, console)
    except (FloatingPointError, OutOfMemoryError, SaveError) as error:
        _print_error(parsed.command, error)
        return 1
    except (ValueError, OSError) as error:
        _print_error(parsed.command, error)
        return 2
    except RunStopped as stopped:
        print(f"lorax: {stopped}; go on with --resume auto", file=sys.stderr)
        return STOPPED_STATUS
    except KeyboardInterrupt:
        print("lorax: stopped", file=sys.stderr)
        return 130
    return 0


def _move_resume(words: list[str]) -> list[str]:
    """Puts --resume before the settings, where argparse takes it; a bare one gets its value."""
    for i, word in enumerate(words):
        if word == "--resume":
            given = words[i + 1 : i + 2] in (["always"], ["auto"])
            option, after = f"--resume={words[i + 1] if given else 'always'}", i + 1 + given
        elif word.startswith("--resume="):
            option, after = word, i + 1
        else:
            continue
        command, *rest = [*words[:i], *words[after:]] or [""]
        return [command, option, *rest]
    return words


def _print_error(command: str, error: BaseException) -> None:
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    print(f"lorax {command}: error: {describe(error)}{notes}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """Parses words, and shows long ones clipped."""

    @override
    def error(self, message: str) -> NoReturn:
        super().error(clip_words(message, LONGEST))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lorax", description="LoRA fine-tuning of language models in JAX.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"lorax {find_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def add(name, run, text):
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(run=run)
        return command

    for name, run, text in (
        ("train", _train, "Fine-tune a model, export it, verify the export."),
        (
            "validate",
            _validate,
            "Check a config, its data, its targets and the files of the weights.",
        ),
        ("inspect", _inspect, "Show the adapted modules and rendered rows with their loss mask."),
        ("plan", _plan, "Say what memory and time a step will need; reads no weights and no data."),
    ):
        command = add(name, run, text)
        command.add_argument("config", help="a YAML file, such as configs/tiny_cpu.yaml")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="such as lora.r=8")
        if name == "train":
            command.add_argument(
                "--resume",
                choices=("always", "auto"),
                default="never",
                help="go on with the run in save.output_dir; `auto` begins one if there is none; "
                "--resume alone is `always`",
            )
        if name == "inspect":
            command.add_argument("--rows", type=int, default=3, help="rows to show")
    add_generate(add)
    add_export(add)
    return parser


def _train(parsed, console: Console) -> None:
    phases = Phases(process_age() or 0.0)
    phases.end("imports")
    # While it trains, the trainer listens; before and after that there is nothing to save.
    _stop_when_asked()
    config = load_config(parsed.config, parsed.overrides)
    run_training(config, console, phases, resume=parsed.resume)


def _stop_when_asked() -> None:
    """Has a signal raise `RunStopped`, again if something discards it."""

    def stop(number: int, _: object) -> None:
        await_second()
        name = signal.Signals(number).name
        what = "while it did not train; what was saved, if any, is whole"
        raise RunStopped(f"stopped by {name} {what}")

    def discarded(unraisable: Any) -> None:
        stopped = unraisable.exc_value
        if not isinstance(stopped, RunStopped):
            sys.__unraisablehook__(unraisable)
            return

        def again(*_: object) -> None:
            raise RunStopped(*stopped.args)

        signal.signal(signal.SIGALRM, again)
        signal.setitimer(signal.ITIMER_REAL, 0.01)

    for each in asking_signals():
        signal.signal(each, stop)
    # What a callback of the garbage collector raises, and JAX has one, Python only prints.
    sys.unraisablehook = discarded


def _validate(parsed, console: Console) -> None:
    config = _load_config(parsed, console)
    find_run(Path(config.save.output_dir), "auto")  # it may be for a run that is there
    check_weights(config)
    inputs = load_inputs(config)
    report_notes(console, input_notes(inputs.base, config.model.adapter))
    adapted = check_targets(config, inputs.base)
    rows = module_rows(adapted)
    report_data(console, config, inputs.datasets, inputs.tokenizer, rows=0, context=inputs.context)
    plan = check_plan(config, inputs)
    modules = sum(row.count for row in rows)
    trained = sum(row.parameters for row in rows)
    if rows:
        console.print(
            f"lora: {modules} modules, {trained:,} parameters in A and B", highlight=False
        )
    console.print(
        f"batches: {plan.steps_per_epoch:,} optimizer steps per epoch, rows of up to "
        f"{max(plan.widths)} tokens",
        highlight=False,
    )
    console.print(f"{parsed.config}: valid", highlight=False)


def _inspect(parsed, console: Console) -> None:
    config = _load_config(parsed, console)
    inputs = load_inputs(config)
    adapted = check_targets(config, inputs.base)
    console.rule("Settings")
    print_config(console, config)
    report_notes(console, input_notes(inputs.base, config.model.adapter))
    console.rule("Data")
    report_data(
        console,
        config,
        inputs.datasets,
        inputs.tokenizer,
        rows=parsed.rows,
        context=inputs.context,
    )
    if config.train.method == "lora":
        console.rule("Modules")
        report_kernels(console, config, adapted)
        print_modules(console, module_rows(adapted), None)


def _plan(parsed, console: Console) -> None:
    config = _load_config(parsed, console)
    planner = make_planner(config)
    report_notes(console, planner.architecture.notes)
    report_plan(console, config, planner)


def _load_config(parsed, console: Console) -> RunConfig:
    tell = lambda text: console.print(text, highlight=False, soft_wrap=True)
    return with_recorded_revision(load_config(parsed.config, parsed.overrides), tell)


if __name__ == "__main__":
    run()
