"""Finds the rows behind a loss or a gradient that is not finite."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from lorax.data.batches import Batches
from lorax.objectives.objective import Objective
from lorax.system.wording import describe
from lorax.training.course import Position


def find_micro_batches(
    model: nnx.Module, objective: Objective, batch: dict[str, jax.Array]
) -> list[int]:
    """Returns the micro-batches, from 0, whose loss is not finite with the model's weights.

    Dropout is off, so a loss that only some dropout mask overflows is not found. A gradient that
    overflows under a finite loss is not found either.
    """
    evaluated = nnx.clone(model)
    evaluated.eval()
    graph, state = nnx.split(evaluated)
    loss = jax.jit(lambda state, micro: objective.terms(nnx.merge(graph, state), micro).total)
    count = jax.tree.leaves(batch)[0].shape[0]
    batch = jax.device_put(batch, jax.memory.Space.Device)  # some of it may be the host's

    def take(i):
        return jax.tree.map(lambda x: x[i], batch)

    return [i for i in range(count) if not math.isfinite(float(loss(state, take(i))))]


def explain_step(
    folder: Path,
    event: Mapping[str, Any],
    at: Position,
    batches: Batches,
    model: nnx.Module,
    objective: Objective,
) -> str:
    """Names and dumps the rows of a step that was not applied; see `report_rows`.

    Args:
        folder: The run's folder.
        event: The step's event.
        at: The step's position in the run.
        batches: The run's batches.
        model: The model with the weights from before the step.
        objective: The run's objective.
    """
    bad = find_micro_batches(model, objective, at.batch)
    return report_rows(folder, event, bad, batches.rows(at.epoch, at.at), batches.dataset.lengths)


def nonfinite_error(found: str, kept: str, allowed: int) -> FloatingPointError:
    """Returns the error that ends a run.

    Args:
        found: From `explain_step`.
        kept: Names the weights on the disk.
        allowed: Steps that may be left out.
    """
    return FloatingPointError(
        f"{found}. The weights are those before it; {kept}. Lower train.learning_rate, look at its "
        "rows, or go on without it: --resume and a higher train.skip_nonfinite_steps "
        f"({allowed} allowed)"
    )


def describe_rows(micro_batches: Sequence[int], rows: Sequence[Sequence[int]]) -> str:
    """Lists the dataset rows of some micro-batches, for a message."""
    if not micro_batches:
        return "every micro-batch has a finite loss, so a gradient overflowed"
    listed = [row for i in micro_batches for row in rows[i]]
    shown = ", ".join(map(str, listed[:8])) + (", …" if len(listed) > 8 else "")
    plural = "es" if len(micro_batches) > 1 else ""
    return f"micro-batch{plural} {', '.join(map(str, micro_batches))}, dataset rows {shown}"


def report_rows(
    folder: Path,
    metrics: Mapping[str, Any],
    micro_batches: Sequence[int],
    rows: Sequence[Sequence[int]],
    lengths: Any,
) -> str:
    """Writes the rows of a step to a file in `folder`, and returns a line that names both.

    The file holds numbers of rows and their lengths, never their text.

    Args:
        folder: The run's folder.
        metrics: The step's ``step``, ``loss`` and ``grad_norm``.
        micro_batches: Those that are not finite.
        rows: Dataset rows of each micro-batch.
        lengths: Tokens of each dataset row.
    """
    step, loss, norm = (metrics[name] for name in ("step", "loss", "grad_norm"))
    record = {
        "step": step,
        "loss": str(loss),
        "grad_norm": str(norm),
        "nonfinite_micro_batches": list(micro_batches),
        "rows_by_micro_batch": [list(map(int, part)) for part in rows],
        "tokens_by_row": {str(row): int(lengths[row]) for part in rows for row in part},
    }
    path = folder / f"nonfinite-step-{step}.json"
    try:
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        where = str(path)
    except OSError as error:  # the error to report is that of the numbers
        where = f"not written: {describe(error)}"
    described = describe_rows(micro_batches, rows)
    return f"step {step}: loss {loss}, gradient norm {norm}: {described} ({where})"
