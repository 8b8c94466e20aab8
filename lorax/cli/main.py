"""The command line: `lorax train`, `validate`, `inspect`, `plan`, `generate`, `export`."""

import argparse
import gc
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn, override

from rich.console import Console

from lorax.cli.check import inspect, validate
from lorax.cli.export import add_export
from lorax.cli.generate import add_generate
from lorax.cli.plan import plan
from lorax.cli.train import train
from lorax.data.chat.tokenizer import WITHOUT_TORCH
from lorax.recovery.store import SaveError
from lorax.runs.memory import OutOfMemoryError
from lorax.system.signals import STOPPED_STATUS, RunStopped, StopRequest
from lorax.system.streams import Outlet
from lorax.system.threads import works_in_background
from lorax.system.versions import find_version
from lorax.system.wording import LONGEST, clip_words, describe

WIDTH_IN_LOGS = 100


def run(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and ends the process with its exit status; see `main`."""
    WITHOUT_TORCH.set()
    gc.set_threshold(10_000)  # to trace a step of many layers makes objects by the million
    sys.stdout, sys.stderr = Outlet(sys.stdout), Outlet(sys.stderr)
    stop = StopRequest()
    try:
        status = main(arguments, stop)
    except Exception:
        traceback.print_exc()
        status = 1
    if works_in_background() or stop.dropped:
        # Weights are still read, or a step compiled, for a run that could not begin; or a step that
        # was dropped runs, and would be waited for.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def main(arguments: Sequence[str] | None = None, stop: StopRequest | None = None) -> int:
    """Runs one command and returns its exit status.

    0 is success, 2 follows an input that cannot be used, 1 a run that failed, 75 one that was asked
    to stop and can be resumed.

    Args:
        arguments: Words after ``lorax``; those of the process if not given.
        stop: Is told what signals come to while a command trains.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parsed = _parser().parse_args(_move_resume(words))
    parsed.stop = stop
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
            option = f"--resume={words[i + 1] if given else 'always'}"
            after = i + 1 + given
        elif word.startswith("--resume="):
            option = word
            after = i + 1
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
        ("train", train, "Fine-tune a model, export it, verify the export."),
        (
            "validate",
            validate,
            "Check a config, its data, its targets and the files of the weights.",
        ),
        ("inspect", inspect, "Show the adapted modules and rendered rows with their loss mask."),
        ("plan", plan, "Say what memory and time a step will need; reads no weights and no data."),
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
