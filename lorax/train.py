"""The trainer: batches in, one compiled step each, held-out loss, and the weights on disk."""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from lorax.checkpoint import WeightStore
from lorax.config import RunConfig
from lorax.data import EncodedDataset, prefetch
from lorax.evaluate import Evaluator
from lorax.interop.checkpoint import resolve_checkpoint
from lorax.interop.files import refuse_occupied
from lorax.interop.huggingface import save_model
from lorax.interop.peft import save_adapter
from lorax.lora import named_modules
from lorax.loss import LossFunction, causal_lm_loss
from lorax.metrics import ModelSize, Throughput, memory_gib
from lorax.optimizer import make_optimizer, make_schedule
from lorax.preparation import (
    CompiledStep,
    compile_widths,
    count_steps,
    plan_evaluation,
    plan_training,
    prepare_model,
    run_epochs,
)
from lorax.sharding import make_mesh, place_batch
from lorax.step import TrainState, TrainStep, make_train_step

type Event = dict[str, Any]
type Listener = Callable[[Event], None]


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        steps: Optimizer steps done.
        train_loss: Loss of the last step.
        eval_loss_before: Held-out loss of the model as it came, if there are held-out rows.
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

    Raises:
        ValueError: If a step of the run would hold no supervised token, nothing trains, or the
            mesh asks for devices that are not there.
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
    ):
        self.config, self.listeners = config, listeners
        self.mesh = make_mesh(config.mesh.data)
        train, devices = config.train, self.mesh.size
        self.plan = plan_training(config, train_data, devices)
        self.total_steps = count_steps(config, self.plan)
        self._refuse_empty_steps()
        plans = [self.plan]
        if eval_data is None and config.eval.strategy != "no":
            raise ValueError(
                f"eval.strategy is {config.eval.strategy!r} but the Trainer got no eval_data"
            )
        if eval_data is not None:
            if not eval_data.supervised.any():
                raise ValueError("the held-out rows hold no supervised token: nothing to evaluate")
            plans.append(plan_evaluation(config, eval_data, devices))
        self.model = prepare_model(model, config, plans)
        self._compiled_ahead = compiled
        self.schedule = make_schedule(train, self.total_steps)
        self.step, self.state = make_train_step(
            self.model,
            make_optimizer(train, self.total_steps),
            loss_fn,
            seed=train.seed,
            mesh=self.mesh,
        )
        self.evaluator = None
        if eval_data is not None:
            self.evaluator = Evaluator(self.model, plans[1], self.mesh, loss_fn)
        # A hub id becomes a folder now: what cannot be found must not wait for the first save.
        self._base = None
        if train.method == "full":
            self._base = resolve_checkpoint(config.model.name_or_path, config.model.revision)
        self.output_dir = Path(config.save.output_dir)
        refuse_occupied(self.output_dir / "weights")
        self.store = WeightStore(self.output_dir / "weights", self._write_weights)
        self.throughput = Throughput(model_size(self.model), list(self.mesh.devices.flat))
        self._mean_document = len(train_data.tokens) / len(train_data)
        self._clock = time.perf_counter()
        self._best: nnx.State | None = None

    def train(self) -> TrainResult:
        """Runs all steps; the trainer's `model` then has the trained (or the best) weights.

        Raises:
            FloatingPointError: If a loss or gradient is not finite, naming the step. The weights
                saved before that step stay.
        """
        with jax.set_mesh(self.mesh):
            return self._train()

    def _train(self) -> TrainResult:
        compiled = self._compile()
        before = loss = self._evaluate(0)
        evaluations_without_gain, stopped, done, last = 0, False, 0, {}
        pending: tuple[int, dict[str, Any], Event] | None = None
        self._clock = time.perf_counter()
        for done, epoch, tokens, batch, is_epoch_end in self._batches():
            width = batch["input_ids"].shape[-1]
            sent = {"epoch": epoch + 1, "tokens": tokens}
            self.state, metrics = compiled[width](self.state, batch)
            # The previous step's numbers are read while this one runs.
            if pending is not None:
                last = self._finish_step(*pending)
            pending = (done, metrics, sent)
            if self._is_evaluation_due(done, is_epoch_end) or done == self.total_steps:
                last, pending = self._finish_step(*pending), None
                loss = self._evaluate(done)
                if loss is not None:
                    improved = self.store.save(done, loss)
                    self._keep_best(improved)
                    evaluations_without_gain = 0 if improved else evaluations_without_gain + 1
                    patience = self.config.eval.early_stopping_patience
                    if patience is not None and evaluations_without_gain >= patience:
                        stopped = True
                        break
            if done % self.config.save.save_steps == 0 or done == self.total_steps:
                if pending is not None:
                    last, pending = self._finish_step(*pending), None
                self.store.save(done)
        best_step = self._load_best()
        self._update_model()
        return TrainResult(
            steps=done,
            train_loss=last["loss"],
            eval_loss_before=before,
            eval_loss=self.store.best_loss if best_step is not None else loss,
            best_step=best_step,
            stopped_early=stopped,
        )

    def _refuse_empty_steps(self) -> None:
        for epoch, steps in run_epochs(self.plan, self.total_steps):
            empty = np.flatnonzero(self.plan.supervised_tokens(epoch)[:steps] == 0)
            if len(empty):
                raise ValueError(
                    f"step {int(empty[0]) + 1} of epoch {epoch + 1} holds no supervised token, so "
                    "its loss is undefined; raise train.gradient_accumulation_steps or set "
                    "data.unsupervised: drop"
                )

    def _compile(self) -> dict[int, TrainStep]:
        """Compiles every shape of the run before the first step, so that none stops it later."""
        if self._compiled_ahead is None:
            found = compile_widths(self.step, self.state, self.plan, self.total_steps)
        else:
            found = self._compiled_ahead.result()
        compiled = {}
        for width, (executable, seconds) in found.items():
            compiled[width] = dataclasses.replace(self.step, compiled=executable)
            self._tell({"compiled_width": width, "seconds": seconds})
        return compiled

    def _batches(self) -> Iterator[tuple[int, int, int, dict[str, jax.Array], bool]]:
        """Yields (step from 1, epoch, tokens, batch on the devices, whether the epoch ends)."""
        done = 0
        place = lambda batch: place_batch(batch, self.mesh)
        for epoch, steps in run_epochs(self.plan, self.total_steps):
            tokens = self.plan.tokens(epoch)
            batches = prefetch(itertools.islice(self.plan.epoch(epoch), steps), place)
            for index, batch in enumerate(batches):
                done += 1
                yield done, epoch, int(tokens[index]), batch, index == steps - 1

    def _finish_step(self, step: int, metrics: dict[str, Any], sent: Event) -> Event:
        """Waits for the numbers of a step, passes them on, and stops if they are not finite."""
        loss, norm, supervised = (float(metrics[k]) for k in ("loss", "grad_norm", "tokens"))
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        speed = self.throughput.add(sent["tokens"], seconds, context_tokens=self._mean_document)
        memory = memory_gib(list(self.mesh.devices.flat))
        event = {
            "step": step,
            "total_steps": self.total_steps,
            "loss": loss,
            "learning_rate": float(self.schedule(step - 1)),
            "grad_norm": norm,
            "supervised_tokens": int(supervised),
            **sent,
            **speed,
            "step_seconds": seconds,
            "memory_gib": memory.gib,
            "memory_of": memory.source,
        }
        self._tell(event)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"step {step}: loss {loss}, gradient norm {norm}. Stopped; "
                f"{self.store.describe()}. Lower train.learning_rate, or look at its rows"
            )
        return event

    def _is_evaluation_due(self, step: int, is_epoch_end: bool) -> bool:
        evaluation = self.config.eval
        if evaluation.strategy == "steps":
            return step % evaluation.steps == 0
        return evaluation.strategy == "epoch" and is_epoch_end

    def _evaluate(self, step: int) -> float | None:
        if self.evaluator is None:
            return None
        loss = self.evaluator(self.state.trainable, self.step.frozen)
        self._tell({"step": step, "eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700))})
        self._clock = time.perf_counter()
        return loss

    def _keep_best(self, improved: bool) -> None:
        if improved and self.config.save.load_best_model_at_end:
            self._best = jax.device_get(self.state.trainable)

    def _load_best(self) -> int | None:
        if self._best is None:
            return None
        best = jax.tree.map(
            lambda value, like: jax.device_put(value, like.sharding),
            self._best,
            self.state.trainable,
        )
        self.state = TrainState(self.state.step, best, self.state.opt_state)
        return self.store.best_step

    def _update_model(self) -> None:
        graph, _, _ = nnx.split(self.model, nnx.Param, ...)
        trained = jax.tree.map(jax.numpy.copy, self.state.trainable)
        self.model = nnx.merge(graph, trained, self.step.frozen)

    def _write_weights(self, folder: Path) -> None:
        self._update_model()
        if self.config.train.method == "full":
            dtype = jax.numpy.dtype(self.config.model.dtype)
            save_model(self.model, folder, dtype=dtype, source_directory=self._base)
        else:
            save_adapter(self.model, folder, base_model_name_or_path=self.config.model.name_or_path)

    def _tell(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)


def model_size(model: Any) -> ModelSize:
    """Counts the weight matrices of a `lorax.models.CausalLM`, for its FLOPs per token."""
    trained = frozen = 0
    for module in named_modules(model).values():
        for name, value in vars(module).items():
            if not isinstance(value, nnx.Variable) or value.get_value() is None or value.ndim < 2:
                continue
            if name == "embedding" and not model.config.tie_word_embeddings:
                continue  # only looked up
            if isinstance(value, nnx.Param):
                trained += value.size
            else:
                frozen += value.size
    config = model.config
    return ModelSize(
        frozen_parameters=frozen,
        trained_parameters=trained,
        layers=config.num_hidden_layers,
        attention_width=config.num_attention_heads * config.head_dim,
    )
