"""`lorax train`, and what a signal does to it while it does not train."""

import signal
import sys
from typing import Any

from rich.console import Console

from lorax.config.run import load_config
from lorax.runs.run import run_training
from lorax.system.clock import Phases, process_age
from lorax.system.signals import RunStopped, asking_signals, await_second


def train(parsed, console: Console) -> None:
    """Trains, exports and verifies."""
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
