"""`lorax validate` and `lorax inspect`: what a run would do, without its weights."""

from pathlib import Path

from rich.console import Console

from lorax.cli.common import read_config
from lorax.report.lines import print_line
from lorax.report.overview import (
    module_rows,
    report_course,
    report_data,
    report_kernels,
    report_notes,
)
from lorax.report.screen import print_config, print_modules
from lorax.runs.checks import check_targets, check_weights
from lorax.runs.folder import find_run
from lorax.runs.model import Blueprint
from lorax.runs.setup import Setup, input_notes
from lorax.system.wording import plural


def validate(parsed, console: Console) -> None:
    """Checks all that can be checked without reading the base model's weights."""
    config = read_config(parsed, console)
    holds_run = find_run(Path(config.save.output_dir), "auto")  # it may be to go on with
    blueprint = Blueprint.of(config)
    check_weights(blueprint)
    setup = Setup.of(blueprint)
    report_notes(console, input_notes(blueprint.architecture, config.model.adapter))
    rows = module_rows(check_targets(blueprint))
    context = blueprint.architecture.context
    report_data(console, config, setup.datasets, setup.tokenizer, rows=0, context=context)
    modules = plural(sum(row.count for row in rows), "module")
    trained = sum(row.parameters for row in rows)
    if rows:
        print_line(console, f"lora: {modules}, {trained:,} parameters in adapters")
    report_course(console, setup.course)
    if holds_run:
        found = f"save.output_dir: {config.save.output_dir} holds a run"
        remedy = "`lorax train` needs --resume to go on with it, or another save.output_dir"
        print_line(console, f"WARNING: {found}: {remedy}", "yellow")
    print_line(console, f"{parsed.config}: valid")


def inspect(parsed, console: Console) -> None:
    """Shows settings, rows as they are learned, and the modules that train."""
    config = read_config(parsed, console)
    blueprint = Blueprint.of(config)
    setup = Setup.of(blueprint)
    adapted = check_targets(blueprint)
    console.rule("Settings")
    print_config(console, config, verbose=parsed.verbose)
    report_notes(console, input_notes(blueprint.architecture, config.model.adapter))
    console.rule("Data")
    report_data(
        console,
        config,
        setup.datasets,
        setup.tokenizer,
        rows=parsed.rows,
        context=blueprint.architecture.context,
    )
    if config.train.method == "lora":
        console.rule("Modules")
        report_kernels(console, config, adapted)
        print_modules(console, module_rows(adapted), None)
