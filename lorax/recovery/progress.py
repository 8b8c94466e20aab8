"""The progress of a run, and its result."""

import dataclasses
import math
from typing import Any


@dataclasses.dataclass
class Progress:
    """The progress of a run, without its weights and its optimizer's state.

    The order of the data and the dropout masks are functions of the seed and the step, so the step
    is all that they need.

    Attributes:
        step: Optimizer steps done.
        train_loss: Loss of the last step.
        recent_losses: Losses of the last fifty steps, to recognise a spike.
        eval_loss: Last held-out loss.
        eval_loss_before: Held-out loss before the first step.
        settled: Last step whose evaluation and save, if due, are done.
        evaluations_without_gain: Evaluations since the best held-out loss.
        best_loss: Lowest held-out loss.
        best_step: Its step.
        stopped_early: Whether the patience ran out.
        skipped: Steps left out because they were not finite.
        weights: Steps whose weights are on the disk.
        notes: Values that the caller wants restored.
    """

    step: int = 0
    train_loss: float | None = None
    recent_losses: list[float] = dataclasses.field(default_factory=list)
    eval_loss: float | None = None
    eval_loss_before: float | None = None
    settled: int = 0
    evaluations_without_gain: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    stopped_early: bool = False
    skipped: int = 0
    weights: list[int] = dataclasses.field(default_factory=list)
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def note(self, step: int, loss: float) -> None:
        """Records that a step is done, and its loss."""
        self.step = step
        self.train_loss = loss
        if math.isfinite(loss):
            self.recent_losses = [*self.recent_losses, loss][-50:]


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    Attributes:
        steps: Optimizer steps done.
        train_loss: Loss of the last step.
        eval_loss_before: Held-out loss before the first step, if there are held-out rows.
        eval_loss: Held-out loss of the weights that the trainer's model now has.
        best_step: Step of those weights, where the best were loaded.
        stopped_early: Whether the patience ran out.
    """

    steps: int
    train_loss: float
    eval_loss_before: float | None
    eval_loss: float | None
    best_step: int | None
    stopped_early: bool
