"""The trainer: batches in, one compiled step each, held-out loss, weights and checkpoints."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from lorax.adapters.nnx.apply import fingerprint_adapters
from lorax.config.run import RunConfig
from lorax.data.dataset import EncodedDataset
from lorax.devices.placement import batch_placer, place_parameters
from lorax.devices.specs import parts_of
from lorax.models.stack.recompute import Recomputation, settings_of
from lorax.objectives.objective import LossFunction, Objective
from lorax.objectives.objectives import as_objective
from lorax.recovery.identity import (
    Identity,
    fingerprint_weights,
    fixed_settings,
    identify_rows,
)
from lorax.recovery.progress import Progress, TrainResult
from lorax.recovery.saver import Saver
from lorax.system.signals import RunStopped, StopAskedError, StopRequest
from lorax.system.watchdog import Watchdog
from lorax.training.ahead import CompiledStep, compile_widths
from lorax.training.arguments import check_run
from lorax.training.course import Course, Position
from lorax.training.evaluate import Evaluator
from lorax.training.events import Event, StepEvents, Throughput, model_size
from lorax.training.long_steps import LongSteps, StepDroppedError
from lorax.training.nonfinite import explain_step, nonfinite_error
from lorax.training.step import TrainState, TrainStep, build_step
from lorax.training.weights import TrainedWeights

type Listener = Callable[[Event], None]


class _Dispatched(NamedTuple):
    """A dispatched step whose metrics have not been read yet."""

    at: Position
    metrics: dict[str, jax.Array]
    begun: float

    @property
    def step(self) -> int:
        return self.at.step


class Trainer:
    """Trains the `nnx.Param` weights of a model as a config says.

    One optimizer step takes ``per_device_train_batch_size × gradient_accumulation_steps ×
    devices`` rows and equals the step of one batch of that size: the loss is
    ``Σ nll / supervised tokens`` over all of them. The last rows of an epoch make a step of their
    own.

    Args:
        model: A model from `lorax.load_model`, adapted by `apply_lora` or not.
        config: The run. Of its model section only the name is read, and with the method `full`
            its dtype, for the weights on disk; the lora section is not read.
        train_data: Encoded rows to learn from.
        eval_data: Encoded held-out rows.
        loss_fn: ``(model, micro_batch) -> (sum of losses, count)``, or an objective; the one of the
            settings if not given.
        listeners: Called with each step's and each evaluation's metrics, in order.
        compiled: From `compile_ahead`, called with the same settings and data.
        resume: Resumes from the newest checkpoint in the run's directory, bit for bit as if it had
            never stopped; begins if there is none yet.
        files: Fingerprints by name of files that must not change between stop and resume; without
            any, the frozen weights get one.
        course: `Course.of` the same config and rows, if it is known already.
        identity: The run's identity, complete except for its adapters, in the place of `files`.
        save_options: Options of `save_model`, for the method `full`.
        stop: Receives the signals that request a stop; the trainer's own if not given.

    Raises:
        ValueError: If a step of the run would hold no supervised token, nothing trains, the mesh
            asks for absent devices, or the checkpoint is another run's.
    """

    def __init__(
        self,
        model: Any,
        config: RunConfig,
        train_data: EncodedDataset,
        eval_data: EncodedDataset | None = None,
        *,
        loss_fn: LossFunction | Objective | None = None,
        listeners: tuple[Listener, ...] = (),
        compiled: "Future[dict[int, CompiledStep]] | None" = None,
        resume: bool = False,
        files: Mapping[str, str] | None = None,
        course: Course | None = None,
        identity: Identity | None = None,
        save_options: Mapping[str, Any] | None = None,
        stop: StopRequest | None = None,
    ):
        check_run(model, config, train_data, eval_data, one_objective=course is None or not loss_fn)
        self.config = config
        self.listeners = listeners
        objective = None if loss_fn is None else as_objective(loss_fn)
        course = course or Course.of(config, train_data, eval_data, objective)
        self.course = course
        self.batches = course.batches
        self.total_steps = course.total_steps
        course.check()
        self.model = course.prepare_model(model)
        self._compiled_ahead = compiled
        self.step, self.state = build_step(
            self.model, course.optimizer, course.objective, **course.step_options
        )
        self._place = batch_placer(self.model, course.mesh)
        self.evaluator = Evaluator.of(course, self.model)
        self._weights = TrainedWeights(config, self.model, self.step.frozen, save_options)
        self.throughput = Throughput(model_size(self.model), list(course.mesh.devices.flat))
        self.events = StepEvents(course, self.throughput)
        self._pending: _Dispatched | None = None
        self._watchdog = Watchdog(config.train.stuck_after_seconds)
        self._stop = stop or StopRequest()
        self._long = LongSteps()
        self._beat: Callable[[], object] = lambda: None
        identity = identity or _identify(course, self.model, self.step.frozen, files)
        identity.add({"adapter settings": fingerprint_adapters(self.model)})
        self.saver = Saver.of(config.save, self._write_weights, identity, self._note)
        self.store = self.saver.weights
        self.checkpoints = self.saver.checkpoints
        self.output_dir = Path(config.save.output_dir)
        self.keeps_lock = False
        self.state = self.saver.begin(self.state, resume=resume)

    @property
    def mesh(self) -> Mesh:
        """The devices of the run."""
        return self.course.mesh

    @property
    def progress(self) -> Progress:
        """The progress of the run."""
        return self.saver.progress

    @property
    def _is_done(self) -> bool:
        return self.progress.stopped_early or self.progress.step >= self.total_steps

    def train(self) -> TrainResult:
        """Runs all steps; the trainer's `model` then has the trained (or the best) weights.

        The run is saved when it ends, also by SIGTERM, Ctrl-C or an exception.

        Raises:
            FloatingPointError: If a loss or gradient is not finite, naming the step and its rows;
                the weights are those before that step.
            RunStopped: If a signal asked the run to stop, after saving.
            CheckpointError: If a checkpoint could not be saved, and `save.on_save_error` is `stop`.
        """
        self._long = LongSteps()
        self.state = self._put(self.state)  # a run that was stopped may go on
        with contextlib.ExitStack() as stack:
            stack.enter_context(jax.set_mesh(self.course.mesh))
            if not self.keeps_lock:
                stack.enter_context(contextlib.closing(self.checkpoints))
            self.checkpoints.open()
            self.checkpoints.prunes = True
            compiled = {} if self._is_done else self._compile()
            with self._stop.listening(self._watchdog.beat), self._watchdog.watching():
                self._beat = lambda: (self._watchdog.beat(), self._stop.check())
                try:
                    self._run_until_asked(compiled)
                except RunStopped:
                    raise
                except BaseException as error:
                    # The state includes the last step, even if a listener raises on its event.
                    def read():
                        return self._pending and self._note_numbers(self._pending)

                    self.saver.rescue(lambda: self._reach(read), error)
                    raise
            return self._finish()

    def _run_until_asked(self, compiled: dict[int, TrainStep]) -> None:
        try:
            self._run_steps(compiled)
            self._beat()
        except StopAskedError as asked:
            raise self.saver.stop(asked, lambda: self._reach(self._finish_pending)) from None

    def _run_steps(self, compiled: dict[int, TrainStep]) -> None:
        progress = self.progress
        if progress.step == 0:
            progress.eval_loss_before = progress.eval_loss = self._evaluate(0)
        elif progress.settled < progress.step:  # the run was stopped right after this step
            self._settle(progress.step)
        self.events.restart_clock()
        before = self.total_steps if progress.stopped_early else progress.step
        for at in self.course.after(before, self._place):
            self._prepare_to_drop(at.width)
            begun = time.perf_counter()
            self.state, metrics = compiled[at.width](self.state, at.batch)
            # The previous step's metrics are read while this one runs.
            self._finish_pending(_Dispatched(at, metrics, begun))
            if self.config.train.skip_nonfinite_steps:
                self._finish_pending()  # at once: the next one is not run if too many were skipped
            self._settle(at.step)
            self.saver.check()
            if progress.stopped_early:
                break

    def _prepare_to_drop(self, width: int) -> None:
        """Keeps the state from before the next step, if that may take too long for a signal."""
        if self._long.before is not None or self._long.may_come(width):
            self._finish_pending()  # its time may show that the next one is short
        self._beat()
        self._long.before = None
        if self._long.may_come(width):
            self._long.keep(self.state)

    def _settle(self, step: int) -> None:
        """Evaluates and saves if due after a step."""
        progress = self.progress
        due = self.course.due_after(step)
        if due.evaluation:
            self._finish_pending()
            self._evaluate_and_keep(step)
        progress.settled = step
        if due.save or progress.stopped_early:
            self._finish_pending()
            self.saver.save_weights(step)
            self.saver.save(self.state.resumable())

    def _evaluate_and_keep(self, step: int) -> None:
        self.progress.eval_loss = loss = self._evaluate(step)
        if loss is not None:
            patience = self.config.eval.early_stopping_patience
            self.saver.keep_evaluated(step, loss, self.state.trainable, patience)

    def _finish(self) -> TrainResult:
        self.saver.wait()
        self._long.before = None
        if self.saver.best is not None:
            best = self._put(self.saver.best)
            self.state = dataclasses.replace(self.state, trainable=best)
        self.model = self._weights.on_model(self.state.trainable)
        return self.saver.result()

    def _reach(self, read: Callable[[], object]) -> TrainState:
        """Returns the state to save when the run is stopped; `read` waits for the last metrics."""
        with contextlib.suppress(StepDroppedError):
            read()
        self.state = self._long.reached(self.state)
        self._watchdog.beat()
        return self.state.resumable()

    def _compile(self) -> dict[int, TrainStep]:
        """Compiles every shape of the run before the first step, so that no step waits later."""
        ahead = self._compiled_ahead
        arguments = (self.step, self.state, self.course, self._place)
        found = ahead.result() if ahead else compile_widths(*arguments)
        for width, (_, seconds, kept) in found.items():
            self._notify({"compiled_width": width, "seconds": seconds, "kept": kept})
        return {width: step.put_into(self.step) for width, step in found.items()}

    def _finish_pending(self, following: _Dispatched | None = None) -> None:
        """Waits for the metrics of the last step, passes them on, and stops if not finite."""
        pending = self._pending
        self._pending = following
        if pending is None:
            return
        before = self.progress.recent_losses
        numbers = self._note_numbers(pending)
        event = self.events.describe(pending.at, numbers, before)
        self._notify(event)
        if not numbers["applied"]:
            self._refuse_nonfinite(event, pending.at)

    def _note_numbers(self, pending: _Dispatched) -> dict[str, Any]:
        """Waits for the metrics of a step, and records the progress after it."""
        self._long.wait(pending.metrics, pending.at.width, pending.begun, self._stop)
        numbers = jax.device_get(pending.metrics)
        if numbers["applied"] or self.config.train.skip_nonfinite_steps:
            self.progress.note(pending.step, float(numbers["loss"]))
        return numbers

    def _refuse_nonfinite(self, event: Event, at: Position) -> None:
        """Names and dumps the rows of a step that was not applied; counts it or ends the run."""
        allowed = self.config.train.skip_nonfinite_steps
        progress = self.progress
        self.model = self._weights.on_model(self.state.trainable)
        found = explain_step(
            self.output_dir, event, at, self.batches, self.model, self.course.objective
        )
        if progress.skipped < allowed:
            progress.skipped += 1
            self._note(f"WARNING: {found}. Left out, {progress.skipped} of {allowed}")
            return
        if allowed:  # a resumed run repeats this step
            progress.step = at.step - 1
            self.state = dataclasses.replace(self.state, step=self.state.step - 1)
        raise nonfinite_error(found, self.store.describe(), allowed)

    def _evaluate(self, step: int) -> float | None:
        if self.evaluator is None:
            return None

        # A signal interrupts it; the resumed run repeats it.
        def wait(sums):
            self._stop.wait(sums)
            self._beat()

        found = self.evaluator(self.state.trainable, self.step.frozen, wait)
        loss = found["loss"]
        metrics = {f"eval_{name}": value for name, value in found.items()}
        self._notify({"step": step, **metrics, "eval_perplexity": math.exp(min(loss, 700))})
        self.events.restart_clock()
        return loss

    def _notify(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)

    def _put(self, tree: Any) -> Any:
        return place_parameters(tree, self.course.mesh, parts_of(self.model))

    def _note(self, text: str) -> None:
        self._notify({"note": text})

    def _write_weights(self, folder: Path) -> None:
        self._weights.write(folder, self.state.trainable)


def _identify(course: Course, model: Any, frozen: Any, files: Mapping[str, str] | None) -> Identity:
    """Returns the identity of a run that was not set up by `lorax.runs`."""
    identity = Identity(where=str(Path(course.config.save.output_dir)), settings_of=settings_of)
    identity.add(
        {
            "settings": fixed_settings(course.config),
            "devices": course.mesh.size,
            "gradient checkpointing": str(Recomputation.of(model)),
            **identify_rows(course.train, course.held_out),
            **(files or {"base model": fingerprint_weights(frozen)}),
        }
    )
    return identity
