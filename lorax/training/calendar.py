"""What a run trains on, step by step: epochs, batches, and when to evaluate."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from lorax.config.run import EvalConfig, RunConfig
from lorax.config.train import TrainConfig
from lorax.data.batches import BatchPlan
from lorax.data.dataset import EncodedDataset
from lorax.data.prefetch import prefetch
from lorax.layers.documents import DocumentLayout


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
