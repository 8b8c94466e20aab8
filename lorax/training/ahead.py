"""Compiling the steps of a run while its weights are still being read."""

import contextlib
import dataclasses
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
from lorax.devices.placement import batch_placer
from lorax.devices.step_cache import ProgramCache
from lorax.devices.xla_cache import kept_elsewhere
from lorax.models.decoder import CausalLM
from lorax.models.stack.recompute import Recomputation
from lorax.objectives.objectives import OBJECTIVES
from lorax.system.threads import in_background
from lorax.training.course import Course
from lorax.training.step import TrainState, TrainStep, make_abstract_step


class CompiledStep(NamedTuple):
    """A compiled step, its compile time in seconds, and whether an earlier run had compiled it."""

    executable: Any
    seconds: float
    found: bool

    def put_into(self, step: TrainStep) -> TrainStep:
        """Returns `step` with the compiled program."""
        return dataclasses.replace(step, compiled=self.executable)


def compile_ahead(
    shapes: Any,
    course: Course,
    *,
    programs: ProgramCache | None = None,
) -> Future[dict[int, CompiledStep]]:
    """Compiles the steps of a run in the background, while its weights are still being read.

    Args:
        shapes: The model with shapes in the place of weights, set up as the one that will train.
        course: The course of the run.
        programs: The cache of compiled steps of known objectives, if any. It writes them when
            `keep_waiting` is called.

    Raises:
        ValueError: If the held-out rows hold no supervised token.
    """
    # made here, for both threads
    optimizer = course.optimizer
    _ = course.evaluation

    def compile_steps() -> dict[int, CompiledStep]:
        model = course.prepare_model(shapes)
        step, state = make_abstract_step(model, optimizer, course.objective, **course.step_options)
        place = batch_placer(model, course.mesh)
        if programs is None or course.objective not in OBJECTIVES:
            return compile_widths(step, state, course, place)
        return compile_widths(step, state, course, place, programs, _describe_step(course, model))

    return in_background("compile", compile_steps)


def _describe_step(course: Course, model: CausalLM) -> dict[str, str]:
    """Returns all that decides a step, except the shapes of its arguments."""
    of_step: dict[str, set[str]] = {}
    for key, mark in find_marks(RunConfig).items():
        if mark.in_step:
            section, _, name = key.partition(".")
            of_step.setdefault(section, set()).add(name)
    settings = course.config.model_dump(mode="json", include=of_step)
    return {
        "objective": course.objective.name,
        "settings": json.dumps(settings),
        "architecture": repr(model.config),
        "adapters": fingerprint_adapters(model),
        "recomputed": str(Recomputation.of(model)),
        "documents": repr(model.document_layout),
        "steps": str(course.total_steps),
    }


def compile_widths(
    step: TrainStep,
    state: TrainState,
    course: Course,
    place: Callable[[Any], Any],
    programs: ProgramCache | None = None,
    facts: Mapping[str, str] | None = None,
) -> dict[int, CompiledStep]:
    """Compiles a step for every width of the run's rows.

    Args:
        step: From `make_train_step` or `make_abstract_step`.
        state: The initial state.
        course: The course of the run.
        place: Puts a batch on the devices.
        programs: The cache of compiled steps, if any.
        facts: All that decides the step; see `ProgramCache.find`.
    """
    first = next(iter(course.batches.epoch(0)))
    compiled = {}
    for width in course.widths():

        def fill(x, width=width):
            return np.zeros((*x.shape[:-1], width), x.dtype)

        batch = place(jax.tree.map(fill, first))
        started = time.perf_counter()
        arguments = state, step.frozen, batch
        kept: Any = facts or {}, arguments, (state, dict.fromkeys(step.metrics, 0))
        executable = programs.find(*kept) if programs else None
        was_found = executable is not None
        if executable is None:
            with kept_elsewhere() if programs else contextlib.nullcontext():
                executable = step.compile(state, batch).compiled
        compiled[width] = CompiledStep(executable, time.perf_counter() - started, was_found)
        if programs and not was_found:
            programs.keep_later(executable, *kept)
    return compiled
