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
from flax import nnx

from lorax.adapters.nnx.apply import fingerprint_adapters
from lorax.config.run import RunConfig
from lorax.data.dataset import EncodedDataset
from lorax.devices.mesh import make_mesh
from lorax.devices.placement import batch_placer, place_parameters
from lorax.interop.folder import resolve_base
from lorax.interop.peft import save_adapter
from lorax.interop.save import save_model
from lorax.models.stack.recompute import Recomputation, settings_of
from lorax.objectives.objective import LossFunction
from lorax.objectives.sft import causal_lm_loss
from lorax.recovery.identity import fingerprint_weights, identify_run, name_datasets
from lorax.recovery.progress import Progress, TrainResult
from lorax.recovery.saver import Saver
from lorax.recovery.snapshots import WeightStore
from lorax.recovery.store import CHECKPOINT_FOLDER, CheckpointStore
from lorax.system.files import CheckpointError, refuse_occupied
from lorax.system.signals import RunStopped, StopAskedError, StopRequest
from lorax.system.versions import library_versions
from lorax.system.watchdog import Watchdog
from lorax.training.ahead import CompiledStep, compile_widths
from lorax.training.calendar import (
    batches_after,
    count_steps,
    ends_epoch,
    is_evaluation_due,
    plan_evaluation,
    plan_training,
    prepare_model,
    refuse_empty_steps,
    step_options,
)
from lorax.training.evaluate import Evaluator
from lorax.training.events import Event, StepEvents, Throughput, model_size
from lorax.training.long_steps import LongSteps, StepDroppedError
from lorax.training.nonfinite import find_micro_batches, report_rows
from lorax.training.optim.optimizer import make_optimizer
from lorax.training.optim.schedules import make_schedule
from lorax.training.step import TrainState, TrainStep, make_train_step

type Listener = Callable[[Event], None]


class _Dispatched(NamedTuple):
    """A step whose numbers are still to be read: its batch, and where the batch comes from."""

    step: int
    epoch: int
    at: int
    batch: dict[str, jax.Array]
    metrics: dict[str, jax.Array]
    begun: float


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
        loss_fn: ``(model, micro_batch) -> (sum of losses, count)``.
        listeners: Called with each step's and each evaluation's metrics, in order.
        compiled: From `compile_ahead`, called with the same settings and data.
        resume: Goes on from the newest checkpoint in the run's directory, bit for bit as if it had
            never stopped; from the beginning if there is none yet.
        files: Fingerprints of files that must not change in between, by what they are; if none are
            given, the frozen weights have one.
        stop: Hears the signals that ask the run to stop; its own if not given.

    Raises:
        ValueError: If a step of the run would hold no supervised token, nothing trains, the mesh
            asks for devices that are not there, or what is to be resumed is another run.
    """

    def __init__(
        self,
        model: Any,
        config: RunConfig,
        train_data: EncodedDataset,
        eval_data: EncodedDataset | None = None,
        *,
        loss_fn: LossFunction = causal_lm_loss,
        listeners: tuple[Listener, ...] = (),
        compiled: "Future[dict[int, CompiledStep]] | None" = None,
        resume: bool = False,
        files: Mapping[str, str] | None = None,
        stop: StopRequest | None = None,
    ):
        self.config, self.listeners = config, listeners
        self.mesh = make_mesh(config.mesh.data)
        train, devices = config.train, self.mesh.size
        self.plan = plan_training(config, train_data, devices)
        self.total_steps = count_steps(config, self.plan)
        refuse_empty_steps(self.plan, self.total_steps)
        plans = [self.plan]
        if eval_data is None and config.eval.strategy != "no":
            raise ValueError(
                f"eval.strategy is {config.eval.strategy!r} but the Trainer got no eval_data"
            )
        if eval_data is not None:
            plans.append(plan_evaluation(config, eval_data, devices))
        self.model = prepare_model(model, config, plans)
        self._compiled_ahead = compiled
        optimizer = make_optimizer(train, self.total_steps)
        self.step, self.state = make_train_step(
            self.model, optimizer, loss_fn, mesh=self.mesh, **step_options(train)
        )
        self.loss_fn, self._lengths = loss_fn, train_data.lengths
        self._place = batch_placer(self.model, self.mesh)
        self.evaluator = None
        if eval_data is not None:
            repeats = train.full_determinism
            self.evaluator = Evaluator(
                self.model, plans[1], self.mesh, loss_fn, full_determinism=repeats
            )
        # A hub id becomes a folder now: what cannot be found must not wait for the first save.
        self.beside: dict[str, Any] = {}  # what `save_model` is given besides the model
        if train.method == "full":
            base = resolve_base(config.model)
            self.beside = {"source_directory": base}
        self.output_dir = Path(config.save.output_dir)
        self.store = WeightStore(self.output_dir / "weights", self._write_weights)
        self.throughput = Throughput(model_size(self.model), list(self.mesh.devices.flat))
        schedule = make_schedule(train, self.total_steps)
        self.events = StepEvents(self.plan, self.total_steps, schedule, self.throughput)
        self._pending: _Dispatched | None = None
        self._watchdog = Watchdog(train.stuck_after_seconds)
        self._stop, self._long = stop or StopRequest(), LongSteps()
        self._beat: Callable[[], object] = lambda: None
        datasets = name_datasets(train_data, eval_data)
        tell = lambda text: self._tell({"note": text})
        folder, keep = self.output_dir / CHECKPOINT_FOLDER, config.save.save_total_limit
        versions = library_versions()
        self.checkpoints = CheckpointStore(folder, keep=keep, versions=versions, tell=tell)
        files = dict(files or {"base model": fingerprint_weights(self.step.frozen)})
        files["adapter settings"] = fingerprint_adapters(self.model)
        recomputed = str(Recomputation.of(self.model))
        identity = identify_run(config, datasets, devices, recomputed, files)
        self.saver = Saver(config.save, self.store, self.checkpoints, identity, settings_of, tell)
        self.keeps_lock = False
        if resume:
            self.state = self.saver.resume(self.state)
        elif self.checkpoints.steps():
            raise CheckpointError(
                f"{folder} holds a run's checkpoints: go on with it by resume=True (`lorax train … "
                "--resume`), or choose another save.output_dir"
            )
        else:
            refuse_occupied(self.output_dir / "weights")

    @property
    def progress(self) -> Progress:
        """Where the run stands."""
        return self.saver.progress

    def train(self) -> TrainResult:
        """Runs all steps; the trainer's `model` then has the trained (or the best) weights.

        What was reached is saved when the run ends, and when it is ended: by SIGTERM, Ctrl-C or an
        exception.

        Raises:
            FloatingPointError: If a loss or gradient is not finite, naming the step and its rows;
                the weights are those before that step.
            RunStopped: If a signal asked the run to stop, after saving.
            CheckpointError: If a checkpoint could not be saved, and `save.on_save_error` is `stop`.
        """
        self._long = LongSteps()
        self.state = place_parameters(self.state, self.mesh)  # a run that was stopped may go on
        with contextlib.ExitStack() as stack:
            stack.enter_context(jax.set_mesh(self.mesh))
            if not self.keeps_lock:
                stack.enter_context(contextlib.closing(self.checkpoints))
            self.checkpoints.open()
            self.checkpoints.prunes = True
            compiled = self._compile()
            with self._stop.listening(self._watchdog.beat), self._watchdog.watching():
                self._beat = lambda: (self._watchdog.beat(), self._stop.check())
                try:
                    self._run_until_asked(compiled)
                except RunStopped:
                    raise
                except BaseException as error:
                    self._rescue(error)
                    raise
            return self._finish()

    def _run_until_asked(self, compiled: dict[int, TrainStep]) -> None:
        try:
            self._run_steps(compiled)
            self._beat()
        except StopAskedError as asked:
            self.checkpoints.prunes = False  # a resumed run does; now it would take time
            with contextlib.suppress(StepDroppedError):
                self._finish_pending()
            self.state = self._long.reached(self.state)
            self._watchdog.beat()
            if self.progress.step == 0:
                raise RunStopped(f"stopped by {asked} before the first step was done") from None
            saved = "saved" if self.saver.save(self.state.resumable(), wait=True) else "NOT SAVED"
            where = f"after step {self.progress.step}, {saved}"
            raise RunStopped(f"stopped by {asked} {where}") from None

    def _run_steps(self, compiled: dict[int, TrainStep]) -> None:
        progress = self.progress
        if progress.step == 0:
            progress.eval_loss_before = progress.eval_loss = self._evaluate(0)
        elif progress.settled < progress.step:  # the run was stopped right after this step
            self._settle(progress.step, ends_epoch(self.plan, self.total_steps, progress.step))
        self.events.restart_clock()
        done = self.total_steps if progress.stopped_early else progress.step
        batches = batches_after(done, self.plan, self.total_steps, self._place)
        for done, epoch, index, batch, is_epoch_end in batches:
            width = batch["input_ids"].shape[-1]
            self._prepare_to_drop(width)
            begun = time.perf_counter()
            self.state, metrics = compiled[width](self.state, batch)
            # The previous step's numbers are read while this one runs.
            self._finish_pending(_Dispatched(done, epoch, index, batch, metrics, begun))
            if self.config.train.skip_nonfinite_steps:
                self._finish_pending()  # at once: the next one is not run if too many were skipped
            self._settle(done, is_epoch_end)
            self.saver.check()
            if progress.stopped_early:
                break

    def _prepare_to_drop(self, width: int) -> None:
        """Keeps what is before the next step, if that may take too long for a signal."""
        if self._long.before is not None or self._long.may_come(width):
            self._finish_pending()  # which may tell that none comes
        self._beat()
        self._long.before = None
        if self._long.may_come(width):
            self._long.keep(self.state)

    def _settle(self, step: int, is_epoch_end: bool) -> None:
        """Evaluates and saves as it is due after a step."""
        progress, is_last = self.progress, step == self.total_steps
        if is_evaluation_due(self.config.eval, step, is_epoch_end) or is_last:
            self._finish_pending()
            self._evaluate_and_keep(step)
        progress.settled = step
        if step % self.config.save.save_steps == 0 or is_last or progress.stopped_early:
            self._finish_pending()
            self.saver.save_weights(step)
            self.saver.save(self.state.resumable())

    def _evaluate_and_keep(self, step: int) -> None:
        progress = self.progress
        progress.eval_loss = loss = self._evaluate(step)
        if loss is None:
            return
        improved = self.saver.save_weights(step, loss)
        if improved and self.config.save.load_best_model_at_end:
            self.saver.best = jax.device_get(self.state.trainable)
        waited = 0 if improved else progress.evaluations_without_gain + 1
        patience = self.config.eval.early_stopping_patience
        progress.evaluations_without_gain = waited
        progress.stopped_early = patience is not None and waited >= patience

    def _finish(self) -> TrainResult:
        progress = self.progress
        self.saver.wait()
        self._long.before = None
        best_step = None
        if self.saver.best is not None:
            best = place_parameters(self.saver.best, self.mesh)
            self.state = dataclasses.replace(self.state, trainable=best)
            best_step = self.store.best_step
        self._update_model()
        return TrainResult(
            steps=progress.step,
            train_loss=math.nan if progress.train_loss is None else progress.train_loss,
            eval_loss_before=progress.eval_loss_before,
            eval_loss=self.store.best_loss if best_step is not None else progress.eval_loss,
            best_step=best_step,
            stopped_early=progress.stopped_early,
        )

    def _rescue(self, error: BaseException) -> None:
        """Saves what was reached before an error is passed on."""

        def reach() -> TrainState:
            if self._pending is not None:  # the state has it, whatever its listeners would say
                with contextlib.suppress(StepDroppedError):
                    self._note_numbers(self._pending)
            return self._long.reached(self.state).resumable()

        self.saver.rescue(reach, error)

    def _compile(self) -> dict[int, TrainStep]:
        """Compiles every shape of the run before the first step, so that none stops it later."""
        batches, ahead = (self.plan, self.total_steps, self._place), self._compiled_ahead
        found = ahead.result() if ahead else compile_widths(self.step, self.state, *batches)
        compiled = {}
        for width, (executable, seconds, kept) in found.items():
            compiled[width] = dataclasses.replace(self.step, compiled=executable)
            self._tell({"compiled_width": width, "seconds": seconds, "kept": kept})
        return compiled

    def _finish_pending(self, following: _Dispatched | None = None) -> None:
        """Waits for the numbers of the last step, passes them on, and stops if not finite."""
        pending, self._pending = self._pending, following
        if pending is None:
            return
        before = self.progress.recent_losses
        numbers = self._note_numbers(pending)
        step, epoch, at, batch, *_ = pending
        event = self.events.describe(step, epoch, at, numbers, before)
        self._tell(event)
        if not numbers["applied"]:
            self._refuse_nonfinite(event, self.plan.rows(epoch, at), batch)

    def _note_numbers(self, pending: _Dispatched) -> dict[str, Any]:
        """Waits for the numbers of a step, and notes where the run stands after it."""
        width = pending.batch["input_ids"].shape[-1]
        self._long.wait(pending.metrics, width, pending.begun, self._stop)
        numbers = jax.device_get(pending.metrics)
        if numbers["applied"] or self.config.train.skip_nonfinite_steps:
            self.progress.note(pending.step, float(numbers["loss"]))
        return numbers

    def _refuse_nonfinite(
        self, event: Event, rows: list[list[int]], batch: dict[str, jax.Array]
    ) -> None:
        """Names and dumps the rows of a step that was not applied; counts it or ends the run."""
        allowed = self.config.train.skip_nonfinite_steps
        self._update_model()
        bad = find_micro_batches(self.model, self.loss_fn, batch)
        found = report_rows(self.output_dir, event, bad, rows, self._lengths)
        if self.progress.skipped < allowed:
            self.progress.skipped += 1
            self._tell(
                {"note": f"WARNING: {found}. Left out, {self.progress.skipped} of {allowed}"}
            )
            return
        if allowed:  # a run that goes on tries this step again
            self.progress.step = event["step"] - 1
            self.state = dataclasses.replace(self.state, step=self.state.step - 1)
        raise FloatingPointError(
            f"{found}. The weights are those before it; {self.store.describe()}. Lower "
            "train.learning_rate, look at its rows, or go on without it: --resume and a higher "
            f"train.skip_nonfinite_steps ({allowed} allowed)"
        )

    def _evaluate(self, step: int) -> float | None:
        if self.evaluator is None:
            return None
        loss = self.evaluator(self.state.trainable, self.step.frozen, self._wait_for_evaluation)
        self._tell({"step": step, "eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700))})
        self.events.restart_clock()
        return loss

    def _wait_for_evaluation(self, sums: Any) -> None:
        for _ in self._stop.hear_while_waiting(sums):
            self._stop.check()  # it is not finished first, but made again by a run that goes on
        self._beat()

    def _update_model(self) -> None:
        self.model = self._merge(jax.tree.map(jax.numpy.copy, self.state.trainable))

    def _merge(self, trained: nnx.State) -> Any:
        return nnx.merge(nnx.graphdef(self.model), trained, self.step.frozen)

    def _write_weights(self, folder: Path) -> None:
        model = self.config.model
        if self.config.train.method == "full":
            self._update_model()
            dtype = jax.numpy.dtype(model.dtype)
            save_model(self.model, folder, dtype=dtype, **self.beside)
        else:  # fetched all at once: one by one takes longer than writing them
            trained = self._merge(jax.device_get(self.state.trainable))
            base = {"base_model_name_or_path": model.name_or_path, "revision": model.revision}
            save_adapter(trained, folder, **base)

    def _tell(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)
