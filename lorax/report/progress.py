"""The progress of a run: one line that is renewed on a terminal, and lines in a log."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from lorax.report.lines import print_line
from lorax.system.wording import format_number, format_time

COLUMNS = 80
"""Width of a terminal that the line of a step fits."""

QUIET_SECONDS = 60.0
"""After so long a time without a line, a log has one of the next step, whatever is asked for."""

_BAR = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepLine:
    """The shown values of one step; None stands for an unknown one.

    Attributes:
        step: From 1.
        loss: In nats per token.
        learning_rate: Of this step.
        grad_norm: Before it is scaled down.
        tokens_per_s: Of this step.
        due: Whether a log has a line of it: each `log.logging_steps` steps.
    """

    step: int
    loss: float | None
    learning_rate: float | None
    grad_norm: float | None
    tokens_per_s: float | None
    due: bool = True


@contextlib.contextmanager
def show_progress(
    console: Console,
    total_steps: int,
    *,
    reached: int = 0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[StepLine], None]]:
    """Shows each step on a terminal; elsewhere prints a line of each that is due.

    A log has a line of a step that is not due too, if it had none for `QUIET_SECONDS`.

    Args:
        console: Where to; what is printed to it meanwhile appears above the line.
        total_steps: Steps of the whole run.
        reached: Steps done by an earlier part of the run.
        clock: Gives the time in seconds.

    Yields:
        A function to call after each step.
    """
    left = _TimeLeft(total_steps, clock)
    if console.is_terminal:
        with _make_bar(console) as bar:
            text = f"step {reached:,}/{total_steps:,}"
            task = bar.add_task("", total=total_steps, completed=reached, text=text)

            def renew(line: StepLine) -> None:
                text = describe_step(line, total_steps, left.after(line.step))
                bar.update(task, completed=line.step, text=text)

            yield renew
        return
    printed = -math.inf

    def print_step(line: StepLine) -> None:
        nonlocal printed
        text = describe_step(line, total_steps, left.after(line.step))
        if line.due or clock() - printed >= QUIET_SECONDS:
            printed = clock()
            print_line(console, text)

    yield print_step


def describe_step(line: StepLine, total_steps: int, seconds_left: float | None) -> str:
    """Returns the line of a step, of at most `COLUMNS` characters up to 100,000 steps."""
    total = f"{total_steps:,}"
    is_usual = line.loss is not None and line.loss < 10
    parts = [
        f"step {line.step:>{len(total)},}/{total}",
        f"loss {f'{line.loss:.4f}' if is_usual else format_number(line.loss)}",
        f"lr {'-' if line.learning_rate is None else f'{line.learning_rate:.1e}'}",
        f"grad {format_number(line.grad_norm)}",
        f"{format_number(line.tokens_per_s)} tok/s",
    ]
    if seconds_left is not None:
        parts.append(f"{format_time(seconds_left)} left")
    text = "  ".join(parts)
    return text if len(text) <= COLUMNS else " ".join(parts)


class _TimeLeft:
    """Estimates the time that is left; it counts from the end of the first step, which compiles."""

    def __init__(self, total_steps: int, clock: Callable[[], float]):
        self._total = total_steps
        self._clock = clock
        self._start: tuple[int, float] | None = None

    def after(self, step: int) -> float | None:
        """Returns the seconds left after a step, or None after the first one."""
        now = self._clock()
        first, began = self._start = self._start or (step, now)
        if step == first:
            return None
        return (now - began) / (step - first) * (self._total - step)


def _make_bar(console: Console) -> Progress:
    text = TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True))
    if console.width < COLUMNS + _BAR + 1:
        return Progress(text, console=console)
    return Progress(BarColumn(bar_width=_BAR), text, console=console)
