"""The steps of a run, compiled before the weights are there."""

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np

from lorax.adapters.nnx.apply import fingerprint_adapters
from lorax.config.marks import find_marks
from lorax.config.run import RunConfig
from lorax.data.batches import BatchPlan
from lorax.data.dataset import EncodedDataset
from lorax.devices.mesh import make_mesh
from lorax.devices.placement import batch_placer
from lorax.devices.step_cache import ProgramCache
from lorax.devices.xla_cache import kept_elsewhere
from lorax.models.decoder import CausalLM
from lorax.models.stack.recompute import Recomputation
from lorax.objectives.objective import LossFunction
from lorax.objectives.sft import causal_lm_loss
from lorax.system.threads import start_beside
from lorax.training.calendar import (
    count_steps,
    plan_evaluation,
    plan_training,
    prepare_model,
    run_epochs,
    step_options,
)
from lorax.training.optim.optimizer import make_optimizer
from lorax.training.step import METRICS, TrainState, TrainStep, make_abstract_step


class CompiledStep(NamedTuple):
    """A compiled step, the seconds that it took, and whether an earlier run had compiled it."""

    executable: Any
    seconds: float
    found: bool


def compile_ahead(
    shapes: Any,
    config: RunConfig,
    train_data: EncodedDataset,
    eval_data: EncodedDataset | None = None,
    *,
    loss_fn: LossFunction = causal_lm_loss,
    programs: ProgramCache | None = None,
) -> Future[dict[int, CompiledStep]]:
    """Compiles the steps of a run in a thread, while its weights are still being read.

    Args:
        shapes: The model with shapes in the place of weights, set up as the one that will train.
        config: As for `Trainer`.
        train_data: As for `Trainer`.
        eval_data: As for `Trainer`.
        loss_fn: As for `Trainer`.
        programs: Where steps with `causal_lm_loss` are kept for other runs, if anywhere, once it is
            told to `keep_waiting`.
    """
    mesh, train = make_mesh(config.mesh.data), config.train
    plans = [plan_training(config, train_data, mesh.size)]
    if eval_data is not None:
        plans.append(plan_evaluation(config, eval_data, mesh.size))
    total_steps = count_steps(config, plans[0])

    def compile_steps() -> dict[int, CompiledStep]:
        model = prepare_model(shapes, config, plans)
        batches = plans[0], total_steps, batch_placer(model, mesh)
        optimizer = make_optimizer(train, total_steps)
        step, state = make_abstract_step(
            model, optimizer, loss_fn, mesh=mesh, **step_options(train)
        )
        if programs is None or loss_fn is not causal_lm_loss:
            return compile_widths(step, state, *batches)
        facts = _describe_step(config, model, total_steps)
        return compile_widths(step, state, *batches, programs, facts)

    return start_beside("compile", compile_steps)


def _describe_step(config: RunConfig, model: CausalLM, total_steps: int) -> dict[str, str]:
    """Returns all that decides a step with `causal_lm_loss`, but for the shapes it is given."""
    of_step: dict[str, set[str]] = {}
    for key, mark in find_marks(RunConfig).items():
        if mark.in_step:
            section, _, name = key.partition(".")
            of_step.setdefault(section, set()).add(name)
    settings = config.model_dump(mode="json", include=of_step)
    return {
        "settings": json.dumps(settings),
        "architecture": repr(model.config),
        "adapters": fingerprint_adapters(model),
        "recomputed": str(Recomputation.of(model)),
        "documents": repr(model.document_layout),
        "steps": str(total_steps),
    }


def compile_widths(
    step: TrainStep,
    state: TrainState,
    plan: BatchPlan,
    total_steps: int,
    place: Callable[[Any], Any],
    programs: ProgramCache | None = None,
    facts: Mapping[str, str] | None = None,
) -> dict[int, CompiledStep]:
    """Compiles a step for every width of the run's rows.

    Args:
        step: From `make_train_step` or `make_abstract_step`.
        state: What it starts from.
        plan: Of the run.
        total_steps: Of the run.
        place: Puts a batch on the devices.
        programs: Where compiled steps are kept, if anywhere.
        facts: What decides the step; see `ProgramCache.find`.
    """
    widths = {w for e, n in run_epochs(plan, total_steps) for w in plan.step_shapes(e)[:n]}
    first = next(iter(plan.epoch(0)))
    compiled = {}
    for width in sorted(widths):
        fill = lambda x, width=width: np.zeros((*x.shape[:-1], width), x.dtype)
        batch = place(jax.tree.map(fill, first))
        started = time.perf_counter()
        arguments = state, step.frozen, batch
        kept: Any = facts or {}, arguments, (state, dict.fromkeys(METRICS, 0))
        executable = programs.find(*kept) if programs else None
        was_found = executable is not None
        if executable is None:
            with kept_elsewhere() if programs else contextlib.nullcontext():
                executable = step.compile(state, batch).compiled
        compiled[width] = CompiledStep(executable, time.perf_counter() - started, was_found)
        if programs and not was_found:
            programs.keep_later(executable, *kept)
    return compiled
