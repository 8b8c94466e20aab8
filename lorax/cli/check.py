"""`lorax validate` and `lorax inspect`: what a run would do, without its weights."""

from pathlib import Path

from rich.console import Console

from lorax.cli.common import read_config
from lorax.report.overview import module_rows, report_data, report_kernels, report_notes
from lorax.report.screen import print_config, print_modules
from lorax.runs.checks import check_plan, check_targets, check_weights
from lorax.runs.folder import find_run
from lorax.runs.setup import input_notes, load_inputs


def validate(parsed, console: Console) -> None:
    """Checks all that can be checked without reading the base model's weights."""
    config = read_config(parsed, console)
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


def inspect(parsed, console: Console) -> None:
    """Shows settings, rows as they are learned, and the modules that train."""
    config = read_config(parsed, console)
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
