"""`lorax plan`: memory and time of a run, before it."""

from rich.console import Console

from lorax.cli.common import read_config
from lorax.report.overview import report_notes, report_plan
from lorax.runs.memory import make_planner
from lorax.runs.model import Blueprint


def plan(parsed, console: Console) -> None:
    """Shows what each policy takes, and what fits which device."""
    config = read_config(parsed, console)
    blueprint = Blueprint.of(config)
    planner = make_planner(blueprint)
    report_notes(console, blueprint.architecture.notes)
    report_plan(console, config, planner)
