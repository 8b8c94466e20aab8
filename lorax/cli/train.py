"""`lorax train`."""

from rich.console import Console

from lorax.config.run import load_config
from lorax.runs.run import run_training
from lorax.system.clock import Phases, process_age
from lorax.system.signals import StopRequest


def train(parsed, console: Console) -> None:
    """Trains, exports and verifies."""
    phases = Phases(process_age() or 0.0)
    phases.end("imports")
    stop = _stop_when_asked(parsed.stop)
    config = load_config(parsed.config, parsed.overrides)
    resume = parsed.resume
    run_training(config, console, phases, resume=resume, stop=stop, verbose=parsed.verbose)


def _stop_when_asked(stop: StopRequest | None = None) -> StopRequest:
    """Has a signal end the command; while it trains, the trainer listens, and saves first."""
    stop = stop or StopRequest()
    stop.raise_at_once()
    return stop
