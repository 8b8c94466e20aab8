"""Held-out loss, weighted by tokens."""

import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from lorax.data.batches import Batches
from lorax.data.prefetch import prefetch
from lorax.devices.determinism import compiler_options
from lorax.devices.placement import batch_placer
from lorax.objectives.objective import Objective
from lorax.objectives.sft import SFT
from lorax.training.course import Course


class Evaluator:
    """Held-out loss, ``Σ nll / Σ tokens`` over all rows: independent of the batch size.

    Args:
        model: Decides the structure; the weights are passed to each call.
        batches: Batches of the held-out rows, one micro-batch each, in order.
        mesh: The devices of the batches.
        objective: Gives the sums.
        full_determinism: As for `make_train_step`.
    """

    def __init__(
        self,
        model: nnx.Module,
        batches: Batches,
        mesh: Mesh,
        objective: Objective = SFT,
        *,
        full_determinism: bool = False,
    ):
        evaluated = nnx.clone(model)
        evaluated.eval()
        graph, _, _ = nnx.split(evaluated, nnx.Param, ...)
        self.batches = batches
        self._place = batch_placer(model, mesh)

        def sums(trainable, frozen, batch):
            merged = nnx.merge(graph, trainable, frozen)
            return objective.terms(merged, jax.tree.map(lambda x: x[0], batch))

        options = compiler_options(True) if full_determinism else None
        self._sums = jax.jit(sums, compiler_options=options)

    @classmethod
    def of(cls, course: Course, model: nnx.Module) -> "Evaluator | None":
        """Returns the evaluator of a run; None if it has no held-out rows."""
        if course.evaluation is None:
            return None
        repeats = course.config.train.full_determinism
        return cls(
            model, course.evaluation, course.mesh, course.objective, full_determinism=repeats
        )

    def __call__(
        self,
        trainable: nnx.State,
        frozen: nnx.State,
        wait: Callable[[Any], object] = jax.block_until_ready,
    ) -> dict[str, float]:
        """Returns the mean ``loss``, in nats per supervised token, and the figures.

        Args:
            trainable: Weights that train.
            frozen: The others.
            wait: Waits for the sums of each batch.
        """
        sums = []
        for batch in prefetch(self.batches.epoch(0), self._place):
            sums.append(self._sums(trainable, frozen, batch))
            wait(sums[-4:][0])  # a few ahead, so that the device has work
        for last in sums[-3:]:
            wait(last)
        found = jax.device_get(sums)
        count = sum(int(terms.divisor) for terms in found)

        def mean(values):
            return math.fsum(map(float, values)) / count

        names = found[0].figures
        figures = {name: mean(terms.figures[name] for terms in found) for name in names}
        return {"loss": mean(terms.total for terms in found), **figures}
