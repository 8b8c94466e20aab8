"""What a run trains on, and its steps compiled before the weights are there."""

import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from lorax.adapters.nnx.apply import fingerprint_adapters
from lorax.config.run import EvalConfig, RunConfig
from lorax.config.train import TrainConfig
from lorax.data.batches import BatchPlan
from lorax.data.dataset import EncodedDataset
from lorax.data.prefetch import prefetch
from lorax.devices.mesh import make_mesh
from lorax.devices.placement import batch_placer
from lorax.devices.step_cache import ProgramCache
from lorax.devices.xla_cache import kept_elsewhere
from lorax.layers.documents import DocumentLayout
from lorax.models.decoder import CausalLM
from lorax.models.stack.recompute import Recomputation
from lorax.objectives.objective import LossFunction
from lorax.objectives.sft import causal_lm_loss
from lorax.optimizer import make_optimizer
from lorax.step import METRICS, TrainState, TrainStep, make_abstract_step
from lorax.system.threads import start_beside

_NOT_OF_THE_STEP = (
    ("model", "name_or_path"),
    ("model", "revision"),
    ("train", "gradient_checkpointing"),  # "auto", say: what it comes to counts
    ("train", "kept_layers"),
    ("train", "memory_gib"),
    ("train", "stuck_after_seconds"),
)
"""Settings that decide nothing of a compiled step: a step is found again when they change."""


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


def step_options(train: TrainConfig) -> dict[str, Any]:
    """Returns the options of `make_train_step` that the settings decide."""
    return {
        "seed": train.seed,
        "skip_nonfinite": train.skip_nonfinite_steps > 0,
        "full_determinism": train.full_determinism,
    }


def prepare_model(model: Any, config: RunConfig, plans: list[BatchPlan]) -> Any:
    """Returns a copy of the model, set up to train on the batches of some plans."""
    model = nnx.clone(model)
    model.train()
    # In a fixed order cuDNN takes memory for the square of the longest document, for every
    # document. By a mask it takes no more than for rows that are not packed.
    if config.data.packing and not config.train.full_determinism:
        model.document_layout = _common_layout(plans)
    return model


def _describe_step(config: RunConfig, model: CausalLM, total_steps: int) -> dict[str, str]:
    """Returns all that decides a step with `causal_lm_loss`, but for the shapes it is given."""
    settings = config.model_dump(mode="json", include={"model", "lora", "train", "mesh"})
    for section, name in _NOT_OF_THE_STEP:
        del settings[section][name]
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


def run_epochs(plan: BatchPlan, total_steps: int) -> Iterator[tuple[int, int]]:
    """Yields each epoch and how many of its steps are run."""
    left, epoch = total_steps, 0
    while left > 0:
        steps = min(left, plan.steps_per_epoch)
        yield epoch, steps
        left, epoch = left - steps, epoch + 1


def plan_training(config: RunConfig, data: EncodedDataset, devices: int) -> BatchPlan:
    """Returns the batches of a run: its micro-batches, in an order given by its seed."""
    return BatchPlan(
        data,
        rows_per_micro_batch=config.train.per_device_train_batch_size * devices,
        micro_batches=config.train.gradient_accumulation_steps,
        packing=config.data.packing,
        max_seq_length=config.data.max_seq_length,
        seed=config.train.seed,
        shuffle=config.data.shuffle,
    )


def plan_evaluation(config: RunConfig, data: EncodedDataset, devices: int) -> BatchPlan:
    """Returns the batches of the held-out rows, in the order of the data.

    Raises:
        ValueError: If no token is supervised.
    """
    if not data.supervised.any():
        raise ValueError("the held-out rows hold no supervised token: nothing to evaluate")
    return BatchPlan(
        data,
        rows_per_micro_batch=config.eval.per_device_eval_batch_size * devices,
        micro_batches=1,
        packing=config.data.packing,
        max_seq_length=config.data.max_seq_length,
        seed=config.train.seed,
        shuffle=False,
    )


def count_steps(config: RunConfig, plan: BatchPlan) -> int:
    """Returns the optimizer steps of a run: `max_steps` if it is set, else those of its epochs."""
    if config.train.max_steps > 0:
        return config.train.max_steps
    return math.ceil(config.train.num_train_epochs * plan.steps_per_epoch)


def refuse_empty_steps(plan: BatchPlan, total_steps: int) -> None:
    """Raises ValueError if a step of the run would hold no supervised token."""
    for epoch, steps in run_epochs(plan, total_steps):
        empty = np.flatnonzero(plan.supervised_tokens(epoch)[:steps] == 0)
        if len(empty):
            raise ValueError(
                f"step {int(empty[0]) + 1} of epoch {epoch + 1} holds no supervised token, so "
                "its loss is undefined; raise train.gradient_accumulation_steps or set "
                "data.unsupervised: drop"
            )


def _common_layout(plans: list[BatchPlan]) -> DocumentLayout:
    """Returns a layout that every plan's packed rows fit."""
    layouts = [plan.document_window() for plan in plans]
    window = max(width for width, _ in layouts)
    return DocumentLayout(window, max(count * (window // width) for width, count in layouts))


def batches_after(
    done: int, plan: BatchPlan, total_steps: int, place: Callable[[Any], Any]
) -> Iterator[tuple[int, int, int, dict[str, jax.Array], bool]]:
    """Yields (step from 1, epoch, its step from 0, batch on the devices, whether the epoch ends).

    Args:
        done: Steps that were done before.
        plan: Of the run.
        total_steps: Of the run.
        place: Puts a batch on the devices, ahead of its step.
    """
    before = 0
    for epoch, steps in run_epochs(plan, total_steps):
        first = min(max(done - before, 0), steps)
        if first < steps:
            source = itertools.islice(plan.epoch(epoch, first), steps - first)
            for index, batch in enumerate(prefetch(source, place), start=first):
                yield before + index + 1, epoch, index, batch, index == steps - 1
        before += steps


def ends_epoch(plan: BatchPlan, total_steps: int, step: int) -> bool:
    """Says whether an epoch ends with a step of the run, counted from 1."""
    return step in itertools.accumulate(steps for _, steps in run_epochs(plan, total_steps))


def is_evaluation_due(evaluation: EvalConfig, step: int, is_epoch_end: bool) -> bool:
    """Says whether held-out rows are due after a step."""
    if evaluation.strategy == "steps":
        return step % evaluation.steps == 0
    return evaluation.strategy == "epoch" and is_epoch_end
