"""The command line: `lorax train`, `validate`, `inspect`, `plan`, `generate`, `export`."""

import gc
import os
import sys
import traceback
from collections.abc import Sequence

from rich.console import Console

from lorax.cli.parser import parse
from lorax.data.chat.tokenizer import WITHOUT_TORCH
from lorax.recovery.store import SaveError
from lorax.runs.memory import OutOfMemoryError
from lorax.system.signals import STOPPED_STATUS, RunStopped, StopRequest
from lorax.system.streams import Outlet
from lorax.system.threads import works_in_background
from lorax.system.wording import describe

WIDTH_IN_LOGS = 80


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
        stop: Set by a signal while a command trains.
    """
    parsed = parse(list(sys.argv[1:] if arguments is None else arguments))
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


def _print_error(command: str, error: BaseException) -> None:
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    print(f"lorax {command}: error: {describe(error)}{notes}", file=sys.stderr)
