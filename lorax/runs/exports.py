"""Scores, exports and the loss curve at the end of a run."""

import time
from pathlib import Path

import jax.numpy as jnp
from flax import nnx
from rich.console import Console

from lorax.generation.answers import answer_rows, exact_match
from lorax.interop.export import export_model
from lorax.report.card import write_card
from lorax.report.lines import print_line
from lorax.report.log import METRICS_FILE
from lorax.report.overview import shows_text
from lorax.runs.folder import EXPORT_FOLDERS
from lorax.runs.setup import Setup
from lorax.system.wording import plural


def score_model(setup: Setup, model, console: Console, when: str) -> float | None:
    """Generates answers to held-out rows, if the config asks for it, and shows one."""
    config = setup.config
    if not config.eval.exact_match or setup.eval is None:
        return None
    evaluated = nnx.clone(model)
    evaluated.eval()
    answers = answer_rows(
        evaluated,
        setup.eval,
        setup.tokenizer,
        rows=config.eval.exact_match_rows,
        max_new_tokens=config.eval.max_new_tokens,
        stop_ids=setup.needed_stop_ids(),
    )
    score = exact_match(answers)
    shown = answers[0]
    rows = plural(len(answers), "held-out row")
    print_line(console, f"{when}: exact match {score:.1%} of {rows}")
    if not shows_text(console):
        return score
    print_line(console, f"  asked     {shown.prompt.strip()!r}")
    print_line(console, f"  expected  {shown.expected.strip()!r}")
    print_line(console, f"  answered  {shown.generated.strip()!r}")
    return score


def export_all(setup: Setup, model, console, result, scores) -> dict[str, str]:
    """Exports in every requested format, and verifies each; returns folders by format."""
    config = setup.config
    facts = {"optimizer steps": str(result.steps)}
    if result.eval_loss is not None:
        facts["held-out loss"] = f"{result.eval_loss_before:.4f} → {result.eval_loss:.4f}"
    if scores[1] is not None:
        facts["exact match"] = f"{scores[0]:.1%} → {scores[1]:.1%}"
    files = {}
    rows = setup.blueprint.new_tokens.rows_to_add(setup.blueprint.stored)
    formats = list(config.save.export)
    if config.train.method == "lora" and "peft" not in formats:
        formats.insert(0, "peft")  # what `lorax export` makes the other formats from
    for format in formats:
        folder = Path(config.save.output_dir) / EXPORT_FOLDERS[format]
        if folder.exists():  # of a run that was stopped while it exported
            folder.rename(folder.with_name(f".{folder.name}.superseded-{time.time_ns()}"))
        found = export_model(
            model,
            folder,
            format,
            base=setup.blueprint.folder,
            base_name=config.model.name_or_path,
            base_revision=config.model.revision,
            chat_template=setup.chat_template,
            stop_ids=setup.stop_ids,
            tokenizer=setup.tokenizer,
            dtype=jnp.dtype(config.model.dtype),
            card=write_card(config, format, facts, rows=rows),
            new_tokens=setup.blueprint.new_tokens,
        )
        print_line(console, f"{format}: {folder}")
        print_line(console, f"  verified: {found.describe()}")
        files[format] = str(folder)
    return files


def draw_curve(output: Path, title: str, console: Console) -> dict[str, str]:
    """Draws the losses of a run; an error of the plot is only a warning."""
    try:
        from lorax.report.curve import draw_loss_curve

        draw_loss_curve(output / METRICS_FILE, output / "loss.png", title=title)
    except Exception as error:
        said = f"WARNING: no loss curve: {str(error) or type(error).__name__}"
        print_line(console, said, "yellow")
        return {}
    return {"loss curve": str(output / "loss.png")}
