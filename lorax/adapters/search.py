"""EVA's search: batches run through a model until the directions of all inputs have converged.

It does not know how a model is called: a `Collector` does.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from lorax.adapters.eva import Directions, adjusted_alpha, components_for, redistribute
from lorax.adapters.method import Shape
from lorax.adapters.ranks import check_rank
from lorax.adapters.recording import Found
from lorax.adapters.targets import Target, TargetError, scale_of
from lorax.config.adapter import EVA, LoraConfig
from lorax.layers.maps import Map, Matmul

MOST_BATCHES = 1000
"""Batches after which it is an error that components still turn."""


class Batch(NamedTuple):
    """A batch, and whether it has come before."""

    value: Any
    again: bool


class Collector(Protocol):
    """Runs a model on batches, and collects the directions of the inputs of some layers."""

    def run(self, batch: Any) -> dict[str, Found]:
        """Runs the model on a batch, and returns what is known of each layer then."""
        ...

    def go_on_with(self, names: Iterable[str]) -> None:
        """Has further batches change these layers' directions alone."""
        ...

    def directions(self, name: str) -> Directions:
        """Returns a layer's directions."""
        ...


@dataclasses.dataclass(frozen=True)
class Suited:
    """The targets of a model by what EVA does with them.

    Attributes:
        linear: Those that take part, by name.
        others: Those that keep their rank: embeddings.
        config: The settings.
        maps: The linear maps of those that take part, by name.
    """

    linear: dict[str, Target]
    others: list[Target]
    config: LoraConfig
    maps: dict[str, Matmul]

    @classmethod
    def of(
        cls,
        targets: Iterable[Target],
        config: LoraConfig,
        maps: Mapping[str, Map],
        stacked: Mapping[str, bool],
    ) -> "Suited":
        """Checks the targets of a model.

        Args:
            targets: What would carry an adapter without EVA.
            config: The settings.
            maps: The linear map of each, by name.
            stacked: Whether each is a stack of layers.

        Raises:
            TargetError: If a layer cannot take part, or none does.
        """
        linear = {target.name: target for target in targets}
        others = [linear.pop(name) for name in [*linear] if maps[name].kind == "lookup"]
        if not linear:
            raise TargetError(
                "EVA is for linear layers, and lora.target_modules names embeddings alone: add "
                "some, or write init_lora_weights: true"
            )
        taken = {name: _suited_map(name, maps[name], stacked[name]) for name in linear}
        for name, target in linear.items():
            check_rank(Shape(*taken[name].shape), target)
        return cls(linear, others, config, taken)

    def with_ranks(self, ranks: Mapping[str, int]) -> list[Target]:
        """Returns all targets, those of EVA with their new ranks; one of rank 0 is left out."""
        kept = {target.name: target.r for target in self.others}
        return with_ranks([*self.linear.values(), *self.others], {**ranks, **kept}, self.config)

    def components(self, name: str) -> int:
        """Returns the components of a layer that may be taken."""
        k, n = self.maps[name].shape
        return min(components_for(self.linear[name].r, self.config.eva.rho, k), n)

    def ranks(self, found: Mapping[str, Found]) -> dict[str, int]:
        """Returns the rank of each layer."""
        ratios = {name: each.ratios[: self.components(name)] for name, each in found.items()}
        before = {name: target.r for name, target in self.linear.items()}
        return redistribute(ratios, before, self.config.eva.rho)


def search(
    suited: Suited,
    groups: list[list[str]],
    collector_of: Callable[[dict[str, int]], Collector],
    batches: Iterable[Batch],
) -> tuple[dict[str, int], dict[str, Directions]]:
    """Runs a model until the components that are taken have converged.

    Args:
        suited: The layers.
        groups: Their names, in groups that read one array; the first of a group tells its inputs.
        collector_of: Returns what runs the model, for the layers that tell, each with its
            components.
        batches: From `endless`.

    Returns:
        The rank and the directions of each layer by name.

    Raises:
        TargetError: If a layer is in no group.
        ValueError: If inputs do not vary enough, or their directions do not converge.
    """
    leader_of = {name: group[0] for group in groups for name in group}
    for name in suited.linear:
        if name not in leader_of:
            raise TargetError(
                f"forward does not call {name}, so EVA cannot know its inputs: leave it out "
                "with lora.exclude_modules"
            )
    needed = {group[0]: max(suited.components(name) for name in group) for group in groups}
    collector = collector_of(needed)
    problem = None
    for batch in itertools.islice(batches, MOST_BATCHES):
        found = collector.run(batch.value)
        try:
            ranks = suited.ranks({name: found[leader_of[name]] for name in suited.linear})
        except ValueError as error:
            if batch.again:  # more of the same does not help
                raise
            problem = error
            continue
        problem = None
        left = [
            group[0]
            for group in groups
            if not found[group[0]].converged[: max(ranks[name] for name in group)].all()
        ]
        if not left:
            return ranks, {n: collector.directions(leader_of[n]) for n in suited.linear}
        collector.go_on_with(left)
    raise problem or ValueError(
        f"EVA has not converged after {MOST_BATCHES} batches: lower lora.eva_config.tau, which "
        f"is {suited.config.eva.tau}, or use larger batches"
    )


def with_ranks(
    targets: Iterable[Target], ranks: Mapping[str, int], config: LoraConfig
) -> list[Target]:
    """Returns targets with the ranks that EVA came to; one without a rank is left out."""
    return [_resized(each, ranks[each.name], config) for each in targets if ranks.get(each.name)]


def _resized(target: Target, r: int, config: LoraConfig) -> Target:
    alpha = target.lora_alpha
    if config.eva.adjust_scaling_factors and r != target.r:
        alpha = adjusted_alpha(alpha, target.r, r)
    return dataclasses.replace(target, r=r, lora_alpha=alpha, scale=scale_of(alpha, r, config))


def check_is_eva(config: LoraConfig, otherwise: str) -> None:
    """Refuses settings of another start.

    Args:
        config: The settings.
        otherwise: What is called for these.

    Raises:
        ValueError: Naming it.
    """
    if config.init_lora_weights != EVA:
        raise ValueError(
            f"initialize_eva needs init_lora_weights='eva', got {config.init_lora_weights!r}: set "
            f"it, or call {otherwise}"
        )


def without_eva(config: LoraConfig) -> LoraConfig:
    """Returns the settings with which layers begin before EVA's values take their places."""
    return config.model_copy(update={"init_lora_weights": True, "eva_config": None})


def _suited_map(name: str, linear_map: Map, stacked: bool) -> Matmul:
    """Returns the map of a layer that takes part, and refuses others."""
    if isinstance(linear_map, Matmul) and not stacked:
        return linear_map
    reason = f"a {linear_map.kind}, and EVA is for linear layers"
    if isinstance(linear_map, Matmul):
        reason = "a stack of layers, and EVA gives each layer a rank of its own"
    raise TargetError(
        f"{name} is {reason}: leave it out with lora.exclude_modules, or write "
        "init_lora_weights: true"
    )


def endless(batches: Iterable[Any]) -> Iterator[Batch]:
    """Yields the batches, and again from the first where they end; an iterator's are kept.

    Raises:
        ValueError: If there is none.
    """
    kept = []
    count = 0
    for batch in batches:
        if isinstance(batches, Iterator):
            kept.append(batch)
        count += 1
        yield Batch(batch, again=False)
    if count == 0:
        raise ValueError("batches is empty: EVA needs at least one")
    while True:
        for batch in kept or batches:
            yield Batch(batch, again=True)
