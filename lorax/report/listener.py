"""A trainer's events, sent to the log and to the screen."""

import math
from collections.abc import Callable
from typing import Literal

from rich.console import Console

from lorax.report.lines import print_line
from lorax.report.log import RunLog
from lorax.report.progress import StepLine
from lorax.system.clock import Phases
from lorax.system.wording import describe, plural
from lorax.training.events import Event


class Recorder:
    """Sends the trainer's events to the log and to the screen.

    Args:
        console: The screen.
        logging_steps: Steps between two that are logged, in files and in lines.
        phases: Of the start.
        on_error: What follows when the log cannot be written, as for `save.on_save_error`.
    """

    def __init__(
        self,
        console: Console,
        logging_steps: int,
        phases: Phases,
        on_error: Literal["stop", "warn"] = "stop",
    ):
        self.console = console
        self.logging_steps = logging_steps
        self.phases = phases
        self.on_error = on_error
        self._unlogged = 0
        self.log: RunLog | None = None
        self.show: Callable[[StepLine], object] = lambda _: None

    def __call__(self, event: Event) -> None:
        """Logs one event, if it is due, and shows it."""
        event = dict(event)
        if "note" in event:
            print_line(self.console, event["note"])
            return
        step = event.pop("step", None)
        if step is None:
            self._tell_compiled(event)
            return
        if step == 0:
            self.phases.end("held-out loss")
        if step == 1 and "loss" in event:
            self.phases.end("first step")
            print_line(self.console, f"first step after {self.phases}")
        if "eval_loss" in event:
            print_line(self.console, f"step {step:,}: held-out loss {event['eval_loss']:.4f}")
        due = "eval_loss" in event or self._is_logged(step, event)
        if due:
            self._write(step, event)
        if "loss" in event:
            self.show(
                StepLine(
                    step=step,
                    loss=event["loss"],
                    learning_rate=event["learning_rate"],
                    grad_norm=event["grad_norm"],
                    tokens_per_s=event["tokens_per_s"],
                    due=due,
                )
            )

    def _tell_compiled(self, event: Event) -> None:
        self.phases.end("waiting for the compiler")
        done = "read the program" if event["kept"] else "compiled the step"
        rows = f"rows of {event['compiled_width']:,} tokens"
        print_line(self.console, f"{done} for {rows} in {event['seconds']:.1f} s")

    def _write(self, step: int, event: Event) -> None:
        def say(text):
            return print_line(self.console, text)

        try:
            if self.log is not None:
                self.log.write(step, event)
        except OSError as error:
            if self.on_error == "stop":
                raise
            if not self._unlogged:
                why = f"{describe(error)} (save.on_save_error: warn)"
                say(f"WARNING: not logged from step {step} on: {why}")
            self._unlogged += 1
            return
        if self._unlogged:
            lost = plural(self._unlogged, "line")
            verb = "was" if self._unlogged == 1 else "were"
            say(f"logged again from step {step} on; {lost} {verb} not")
            self._unlogged = 0

    def _is_logged(self, step: int, event: Event) -> bool:
        finite = math.isfinite(event["loss"]) and math.isfinite(event["grad_norm"])
        edge = step in (1, event["total_steps"])
        spike = "spike_rows" in event
        return edge or spike or not finite or step % self.logging_steps == 0
