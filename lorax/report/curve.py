"""The curve of a run's losses, drawn from its log; Matplotlib takes half a second to import."""

import itertools
import math
import os
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lorax.report.log import read_metrics


def draw_loss_curve(
    metrics_path: str | os.PathLike[str],
    png_path: str | os.PathLike[str],
    *,
    title: str = "Training",
) -> None:
    """Draws loss, learning rate and gradient norm over the steps of a `metrics.jsonl`.

    Read are `loss`, `eval_loss`, `learning_rate` and `grad_norm`, where a line has them. The step
    with the lowest held-out loss is marked.

    Raises:
        ValueError: If the file has no loss yet, or a line of it is broken.
    """
    records = read_metrics(metrics_path)
    steps, losses = _find_series(records, "loss")
    if not any(map(math.isfinite, losses)):
        raise ValueError(f"{metrics_path}: no step has a loss: nothing to draw yet")
    figure = Figure(figsize=(9, 7), dpi=150, layout="constrained")
    loss_axes, rate_axes, norm_axes = figure.subplots(
        3, sharex=True, gridspec_kw={"height_ratios": [4, 1, 1.4]}
    )
    _draw_losses(loss_axes, steps, losses, *_find_series(records, "eval_loss"))
    loss_axes.set_title(title, loc="left", fontweight="bold")
    rate_axes.plot(*_find_series(records, "learning_rate"), color="tab:gray", linewidth=1.5)
    rate_axes.set_ylabel("learning rate")
    rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate_axes.set_ylim(bottom=0)
    norm_steps, norms = _find_series(records, "grad_norm")
    _draw_smoothed(norm_axes, norm_steps, norms, "tab:purple", "gradient norm")
    norm_axes.set_ylabel("gradient norm")
    norm_axes.set_ylim(bottom=0)
    norm_axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    norm_axes.set_xlabel("optimizer step")
    for axes in (loss_axes, rate_axes, norm_axes):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    figure.savefig(png_path, format="png")


def _find_series(records: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Returns the steps that have a value; null is NaN."""
    series = {
        record["step"]: math.nan if record[name] is None else float(record[name])
        for record in records
        if name in record
    }
    return sorted(series), [series[step] for step in sorted(series)]


def _draw_losses(
    axes: Axes,
    steps: list[int],
    losses: list[float],
    eval_steps: list[int],
    eval_losses: list[float],
) -> None:
    _draw_smoothed(axes, steps, losses, "tab:blue", "training loss")
    if eval_steps:
        label = f"held-out loss, at the end {eval_losses[-1]:.4f}"
        axes.plot(eval_steps, eval_losses, "o-", color="tab:orange", markersize=5, label=label)
        _mark_best(axes, eval_steps, eval_losses)
    for step, loss in zip(steps, losses, strict=True):
        if not math.isfinite(loss):
            axes.axvline(step, color="tab:red", linewidth=1, label="not finite")
    axes.set_ylabel("loss (nats per token)")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), frameon=False)


def _mark_best(axes: Axes, steps: list[int], losses: list[float]) -> None:
    """Marks the lowest held-out loss, the first of equal ones."""
    found = [(loss, step) for step, loss in zip(steps, losses, strict=True) if math.isfinite(loss)]
    if not found:
        return
    loss, step = min(found)
    label = f"best step {step:,}, held-out loss {loss:.4f}"
    axes.axvline(step, color="tab:green", linewidth=1, linestyle=":", zorder=1)
    axes.plot([step], [loss], "*", color="tab:green", markersize=15, zorder=4, label=label)


def _draw_smoothed(
    axes: Axes, steps: list[int], values: list[float], color: str, label: str
) -> None:
    """Draws every value thinly, and over it their moving mean, where its window is whole."""
    window = len(values) // 60 * 2 + 1
    if window == 1:
        axes.plot(steps, values, ".-", color=color, linewidth=1.5, label=label)
        return
    axes.plot(steps, values, color=color, alpha=0.3, linewidth=0.8, label=f"{label}, each step")
    whole = slice(window // 2, -(window // 2))
    mean = _smooth(values, window)[whole]
    label = f"{label}, mean of {window} steps"
    axes.plot(steps[whole], mean, color=color, linewidth=2, label=label)


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """Returns means over a centred window, narrower towards both ends; NaN is skipped."""
    finite = [value if math.isfinite(value) else 0.0 for value in values]
    totals = [0.0, *itertools.accumulate(finite)]
    counts = [0, *itertools.accumulate(map(math.isfinite, values))]
    smooth = []
    for index in range(len(values)):
        half = min(window // 2, index, len(values) - 1 - index)
        start = index - half
        end = index + half + 1
        count = counts[end] - counts[start]
        smooth.append((totals[end] - totals[start]) / count if count else math.nan)
    return smooth
