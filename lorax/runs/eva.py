"""EVA in a run: its training batches decide the ranks, which its checkpoints keep."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from lorax.adapters.nnx.apply import apply_lora
from lorax.adapters.nnx.eva import apply_ranks, initialize_eva, ranks_of
from lorax.config.adapter import EVA, LoraConfig
from lorax.config.run import RunConfig
from lorax.devices.placement import place_batch
from lorax.models.decoder import CausalLM
from lorax.recovery.identity import Identity
from lorax.recovery.progress import Progress
from lorax.runs.model import Begin, Blueprint
from lorax.runs.setup import Setup
from lorax.training.course import Course

RANKS = "eva ranks"
"""The name of the ranks among the notes of a run's progress."""


def saved_ranks(identity: Identity) -> Mapping[str, int] | None:
    """Returns the ranks that a run's checkpoint keeps; None if the run begins, or is not EVA's."""
    if identity.manifest is None:
        return None
    return identity.manifest["record"]["progress"]["notes"].get(RANKS)


def note_ranks(progress: Progress, config: RunConfig, model: Any) -> None:
    """Notes the ranks of an adapted model, if EVA decided them."""
    if asks_for_eva(config):
        progress.notes[RANKS] = ranks_of(model)


def asks_for_eva(config: RunConfig) -> bool:
    """Says whether a run begins new adapters with EVA."""
    is_new = config.train.method == "lora" and config.model.adapter is None
    return is_new and config.lora.init_lora_weights == EVA


def needs_batches(blueprint: Blueprint) -> bool:
    """Says whether the shapes of a run's adapters are known only after batches."""
    return asks_for_eva(blueprint.config) and blueprint.ranks is None


def begin_on(setup: Setup) -> Begin:
    """Returns what puts the new adapters of a run on its base model.

    With the ranks of a checkpoint, the first values are those of the checkpoint.
    """
    course = setup.course
    ranks = setup.blueprint.ranks
    if not asks_for_eva(setup.config):
        return apply_lora
    if ranks is not None:
        return functools.partial(apply_ranks, ranks=ranks)

    def begin(model: CausalLM, config: LoraConfig, *, rngs: nnx.Rngs) -> CausalLM:
        with jax.set_mesh(course.mesh):
            return initialize_eva(model, config, _MicroBatches(course), rngs=rngs)

    return begin


@dataclasses.dataclass(frozen=True)
class _MicroBatches:
    """The micro-batches of the first epoch, as training has them, each made when it is needed."""

    course: Course

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        for step in self.course.batches.epoch(0):
            for index in range(self.course.batches.micro_batches):
                one = {name: value[index : index + 1] for name, value in step.items()}
                # Without rows of an embedding on the host: it is read from there, whole. No
                # gradient takes memory now.
                placed = place_batch(one, self.course.mesh)
                yield {name: value[0] for name, value in placed.items()}
