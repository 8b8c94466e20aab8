"""The course of a run: objective, epochs, batches, and the actions due after a step."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from lorax.config.run import RunConfig
from lorax.data.batches import Batches
from lorax.data.dataset import EncodedDataset
from lorax.data.prefetch import prefetch
from lorax.devices.mesh import make_mesh
from lorax.layers.documents import DocumentLayout
from lorax.models.decoder import CausalLM
from lorax.models.noise import EmbeddingNoise
from lorax.objectives.objective import Objective
from lorax.objectives.objectives import objective_of
from lorax.training.optim.optimizer import make_optimizer
from lorax.training.optim.schedules import make_schedule


class Due(NamedTuple):
    """The actions due after a step."""

    evaluation: bool
    save: bool


class Position(NamedTuple):
    """A step's place in the run, and its batch on the devices.

    Attributes:
        step: Number of the step, from 1.
        epoch: Number of its epoch, from 0.
        at: Its index in the epoch, from 0.
        batch: Its micro-batches.
    """

    step: int
    epoch: int
    at: int
    batch: dict[str, jax.Array]

    @property
    def width(self) -> int:
        """Width of its rows, which selects the compiled step."""
        return self.batch["input_ids"].shape[-1]


@dataclasses.dataclass(frozen=True)
class Course:
    """The course of a run from its first step to its last: computed once, then only read.

    Attributes:
        config: The run's settings.
        objective: The objective.
        mesh: Its devices.
        train: Encoded rows to learn from.
        held_out: Encoded held-out rows, if there are any.
        batches: Its micro-batches, in an order given by its seed.
        total_steps: `max_steps` if it is set, else those of its epochs.
        schedule: Learning rate by steps done.
    """

    config: RunConfig
    objective: Objective
    mesh: Mesh
    train: EncodedDataset
    held_out: EncodedDataset | None
    batches: Batches
    total_steps: int
    schedule: optax.Schedule

    @classmethod
    def of(
        cls,
        config: RunConfig,
        train: EncodedDataset,
        held_out: EncodedDataset | None = None,
        objective: Objective | None = None,
        mesh: Mesh | None = None,
    ) -> Self:
        """Packs the rows and counts the steps.

        Args:
            config: The run's settings.
            train: Encoded rows to learn from.
            held_out: Encoded held-out rows.
            objective: The objective; the one of the settings if not given.
            mesh: The run's devices, if they are known already.

        Raises:
            ValueError: If the mesh asks for absent devices, a row is too long, or the schedule does
                not fit the run.
        """
        mesh = mesh or make_mesh(config.mesh.data)
        objective = objective or objective_of(config)
        batches = objective.batches(
            train,
            config,
            size=config.train.per_device_train_batch_size * mesh.size,
            count=config.train.gradient_accumulation_steps,
            shuffle=config.data.shuffle,
        )
        steps = config.train.max_steps
        if steps <= 0:
            steps = math.ceil(config.train.num_train_epochs * batches.steps_per_epoch)
        schedule = make_schedule(config.train, steps)
        return cls(config, objective, mesh, train, held_out, batches, steps, schedule)

    @functools.cached_property
    def evaluation(self) -> Batches | None:
        """The batches of the held-out rows, in the order of the data; built on first access.

        Raises:
            ValueError: If no token is supervised.
        """
        config = self.config
        data = self.held_out
        if data is None:
            return None
        if not data.supervised.any():
            raise ValueError("the held-out rows hold no supervised token: nothing to evaluate")
        size = config.eval.per_device_eval_batch_size * self.mesh.size
        return self.objective.batches(data, config, size=size, count=1, shuffle=False)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer, with its schedule over all steps."""
        return make_optimizer(self.config.train, self.total_steps)

    @property
    def step_options(self) -> dict[str, Any]:
        """The options of `make_train_step` that the settings decide."""
        train = self.config.train
        return {
            "mesh": self.mesh,
            "seed": train.seed,
            "skip_nonfinite": train.skip_nonfinite_steps > 0,
            "full_determinism": train.full_determinism,
        }

    def prepare_model(self, model: Any) -> Any:
        """Returns a copy of the model, set up to train on these batches."""
        both = [each for each in (self.batches, self.evaluation) if each is not None]
        model = nnx.clone(model)
        alpha = self.config.train.neftune_noise_alpha
        if isinstance(model, CausalLM):
            model.noise = None if alpha is None else EmbeddingNoise(alpha)
        elif alpha is not None:
            name = type(model).__name__
            raise ValueError(f"train.neftune_noise_alpha needs lorax's CausalLM, got {name}")
        model.train()
        # With a fixed order of sums, cuDNN allocates the square of the longest document for every
        # document. With a mask it allocates no more than for rows that are not packed.
        if self.config.data.packing and not self.config.train.full_determinism:
            model.document_layout = _common_layout(both)
        return model

    def epochs(self) -> Iterator[tuple[int, int]]:
        """Yields each epoch and the number of its steps that are run."""
        left = self.total_steps
        epoch = 0
        while left > 0:
            steps = min(left, self.batches.steps_per_epoch)
            yield epoch, steps
            left -= steps
            epoch += 1

    def widths(self) -> list[int]:
        """Returns the widths of the run's rows, each of which needs a compiled step."""
        return sorted({w for e, n in self.epochs() for w in self.batches.step_shapes(e)[:n]})

    def check(self) -> None:
        """Checks for batches that would end the run at one of its steps.

        Raises:
            ValueError: If a step would hold no supervised token, or there are no rows to evaluate.
        """
        if self.held_out is None and self.config.eval.strategy != "no":
            raise ValueError(
                f"eval.strategy is {self.config.eval.strategy!r} but the Trainer got no eval_data"
            )
        for epoch, steps in self.epochs():
            empty = np.flatnonzero(self.batches.supervised_tokens(epoch)[:steps] == 0)
            if len(empty):
                raise ValueError(
                    f"step {int(empty[0]) + 1} of epoch {epoch + 1} holds no supervised token, so "
                    "its loss is undefined; raise train.gradient_accumulation_steps or set "
                    "data.unsupervised: drop"
                )

    def after(self, done: int, place: Callable[[Any], Any]) -> Iterator[Position]:
        """Yields the remaining steps.

        Args:
            done: Number of steps that are done.
            place: Puts a batch on the devices, ahead of its step.
        """
        before = 0
        for epoch, steps in self.epochs():
            first = min(max(done - before, 0), steps)
            if first < steps:
                source = itertools.islice(self.batches.epoch(epoch, first), steps - first)
                for at, batch in enumerate(prefetch(source, place), start=first):
                    yield Position(before + at + 1, epoch, at, batch)
            before += steps

    def due_after(self, step: int) -> Due:
        """Returns the actions due after a step, counted from 1; after the last one, all are."""
        is_last = step == self.total_steps
        when = self.config.eval
        evaluation = is_last
        if when.strategy == "steps":
            evaluation |= step % when.steps == 0
        elif when.strategy == "epoch":
            evaluation |= step % self.batches.steps_per_epoch == 0
        return Due(evaluation, is_last or step % self.config.save.save_steps == 0)


def _common_layout(both: list[Batches]) -> DocumentLayout:
    """Returns a layout that fits the packed rows of both datasets."""
    layouts = [each.document_window() for each in both]
    window = max(width for width, _ in layouts)
    return DocumentLayout(window, max(count * (window // width) for width, count in layouts))
