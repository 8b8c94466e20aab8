"""EVA on a model: batches decide the ranks and the first values of A."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Key

from lorax.adapters.eva import (
    Directions,
    adjusted_alpha,
    components_for,
    first_values,
    redistribute,
)
from lorax.adapters.method import Shape
from lorax.adapters.nnx.apply import adapt, refuse_adapters, targets_of
from lorax.adapters.nnx.arguments import as_rngs, check_arguments
from lorax.adapters.nnx.directions import Collector, Found, RowMask
from lorax.adapters.nnx.recorder import Forward, carriers_of, readers_of_one_input
from lorax.adapters.nnx.tree import adapted_layers
from lorax.adapters.ranks import check_rank
from lorax.adapters.targets import Target, TargetError, scale_of
from lorax.config.adapter import EVA, LoraConfig
from lorax.layers.carrier import Carrier
from lorax.layers.maps import Matmul
from lorax_kernels import IGNORED

MOST_BATCHES = 1000
"""Batches after which it is an error that components still turn."""


def initialize_eva[M: nnx.Module](
    model: M,
    config: LoraConfig,
    batches: Iterable[Any],
    forward: Forward | None = None,
    *,
    mask: RowMask | None = None,
    rngs: nnx.Rngs | int | Key[Array, ""],
) -> M:
    """Returns `model` with adapters that begin as EVA's: `apply_lora` of `init_lora_weights: eva`.

    The base model runs on the batches, again from the first where they end, until the first
    components of each layer's inputs keep their directions. Then the ranks go to the components
    that explain most: a layer has from 0, which is no adapter, to ``rho · r`` or its narrower side,
    and their sum stays. A's columns are the components, B is zero. An embedding keeps its rank, and
    begins as ever.

    Args:
        model: As for `apply_lora`; it stays as it was.
        config: PEFT's settings, with `init_lora_weights="eva"`.
        batches: Trees of arrays, of few shapes: each new shape is compiled.
        forward: ``(model, batch)``: runs the model. If not given, batches are those of a language
            model of lorax: ``input_ids``, and ``labels``, ``positions`` and ``segment_ids`` if need
            be, each rows × sequence; `use_label_mask` then leaves out tokens that are not learned.
        mask: ``batch -> mask``: which rows count, in the shape of the layers' inputs without
            features; with `forward`, all if not given.
        rngs: As for `apply_lora`.

    Raises:
        TypeError: If an argument is something else.
        TargetError: As `apply_lora`; if a target is a convolution or stacked, or `forward` does not
            call it.
        ValueError: If there is no batch, a mask does not fit, inputs do not vary enough, or their
            directions do not converge.

    Source: Paischer et al. 2024, "One Initialization to Rule them All", §3,
        https://arxiv.org/abs/2410.07170; the loop is that of PEFT 0.21 (`get_eva_state_dict`).
    """
    check_arguments(model, config)
    rngs = as_rngs(rngs)
    if config.init_lora_weights != EVA:
        raise ValueError(
            f"initialize_eva needs init_lora_weights='eva', got {config.init_lora_weights!r}: set "
            "it, or call lorax.apply_lora"
        )
    refuse_adapters(model)
    if forward is None:
        _check_language_model(model)
        forward = run_language_model
        mask = mask or functools.partial(counted_tokens, learned=config.eva.use_label_mask)
    search = _Search.of(model, config, forward, mask)
    ranks, directions = search.run(batches)
    kept = {target.name: target.r for target in search.others}
    adapted = apply_ranks(model, config, {**ranks, **kept}, rngs=rngs)
    for name, layer in adapted_layers(adapted).items():
        if name in directions:
            a = first_values(directions[name], ranks[name], whiten=config.eva.whiten)
            layer.adapter.variable("lora_a").set_value(a)
    return adapted


def apply_ranks[M: nnx.Module](
    model: M, config: LoraConfig, ranks: Mapping[str, int], *, rngs: nnx.Rngs
) -> M:
    """Returns `model` with the adapters that EVA came to, but with other first values.

    Args:
        model: The base model; it may be of shapes.
        config: The settings that EVA was given.
        ranks: The rank of each layer by full name, from `ranks_of`; others have no adapter.
        rngs: Source of the A matrices.
    """
    plain = config.model_copy(update={"init_lora_weights": True, "eva_config": None})
    targets = targets_of(model, config)
    resized = [_resized(each, ranks[each.name], config) for each in targets if ranks.get(each.name)]
    return adapt(model, plain, resized, rngs)


def ranks_of(model: nnx.Module) -> dict[str, int]:
    """Returns the rank of each adapted layer."""
    return {name: layer.adapter.spec.r for name, layer in adapted_layers(model).items()}


def _resized(target: Target, r: int, config: LoraConfig) -> Target:
    alpha = target.lora_alpha
    if config.eva.adjust_scaling_factors and r != target.r:
        alpha = adjusted_alpha(alpha, target.r, r)
    return dataclasses.replace(target, r=r, lora_alpha=alpha, scale=scale_of(alpha, r, config))


def run_language_model(model: Any, batch: Mapping[str, Array]) -> None:
    """Runs a language model of lorax on ``input_ids`` and what comes with them."""
    hidden = model.hidden_states(
        batch["input_ids"], batch.get("positions"), batch.get("segment_ids")
    )
    model.logits(hidden)


def counted_tokens(batch: Mapping[str, Array], *, learned: bool) -> Bool[Array, "rows tokens"]:
    """Returns which tokens count: those that are learned, as in PEFT, or all but padding.

    The label at t is token t + 1, so token t is learned where t - 1 has a label. Padding has the
    segment 0, or the position 0 in a row that has others; a row of one token counts as padding.
    """
    if learned and "labels" in batch:
        return jnp.pad(batch["labels"][:, :-1] != IGNORED, ((0, 0), (1, 0)))
    if "segment_ids" in batch:
        return batch["segment_ids"] > 0
    if "positions" in batch:
        later = batch["positions"] > 0
        return later.at[:, 0].set(later.any(1))
    return jnp.ones(batch["input_ids"].shape, bool)


def _check_language_model(model: Any) -> None:
    if not (hasattr(model, "hidden_states") and hasattr(model, "logits")):
        raise TypeError(
            f"initialize_eva needs forward for a {type(model).__name__}, such as "
            "forward=lambda model, batch: model(batch['x'])"
        )


@dataclasses.dataclass(frozen=True)
class _Search:
    """The search for the ranks and directions of a model's layers.

    Attributes:
        model: A copy of the base model.
        layers: Its layers that take part, by name.
        targets: What they would carry without EVA.
        others: Targets that keep their rank: embeddings.
        config: The settings.
        forward: Runs the model.
        mask: Which rows count; None: all.
    """

    model: Any
    layers: dict[str, Carrier]
    targets: dict[str, Target]
    others: list[Target]
    config: LoraConfig
    forward: Forward
    mask: RowMask | None

    @classmethod
    def of(cls, model: Any, config: LoraConfig, forward: Forward, mask: RowMask | None):
        """Copies a model, and checks its layers.

        Raises:
            TargetError: If a layer cannot take part.
        """
        model = nnx.clone(model)
        model.eval()
        if hasattr(model, "gradient_checkpointing"):  # there is no gradient
            model.gradient_checkpointing = "none"
        targets = {target.name: target for target in targets_of(model, config)}
        layers = carriers_of(model, targets)
        others = [n for n, layer in layers.items() if layer.linear_map.kind == "lookup"]
        if len(others) == len(layers):
            raise TargetError(
                "EVA is for linear layers, and lora.target_modules names embeddings alone: add "
                "some, or write init_lora_weights: true"
            )
        kept = [targets.pop(name) for name in others]
        layers = {name: layers[name] for name in targets}
        for name, target in targets.items():
            _refuse_unsuited(name, layers[name])
            check_rank(Shape(*layers[name].linear_map.shape), target)
        return cls(model, layers, targets, kept, config, forward, mask)

    def run(self, batches: Iterable[Any]) -> tuple[dict[str, int], dict[str, Directions]]:
        """Runs the model until the components that are taken have converged.

        Returns:
            The rank and the directions of each layer by name.
        """
        source = _endless(batches)
        first = next(source)
        groups = self._groups(first.value)
        collector = self._collector(groups)
        leader_of = {name: group[0] for group in groups for name in group}
        problem = None
        for batch in itertools.islice(itertools.chain([first], source), MOST_BATCHES):
            found = collector.run(batch.value)
            try:
                ranks = self._ranks({name: found[leader_of[name]] for name in self.layers})
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
                return ranks, {n: collector.directions(leader_of[n]) for n in self.layers}
            collector.go_on_with(left)
        raise problem or ValueError(
            f"EVA has not converged after {MOST_BATCHES} batches: lower lora.eva_config.tau, which "
            f"is {self.config.eva.tau}, or use larger batches"
        )

    def _groups(self, batch: Any) -> list[list[str]]:
        groups = readers_of_one_input(self.model, self.layers, self.forward, batch)
        called = {name for group in groups for name in group}
        for name in self.layers:
            if name not in called:
                raise TargetError(
                    f"forward does not call {name}, so EVA cannot know its inputs: leave it out "
                    "with lora.exclude_modules"
                )
        return groups

    def _collector(self, groups: list[list[str]]) -> Collector:
        """Returns what collects the directions of the first layer of each group."""
        needed = {group[0]: max(self._components(name) for name in group) for group in groups}
        layers = {name: self.layers[name] for name in needed}
        for name, layer in self.layers.items():
            if name not in layers:
                layer.listener = _ignore  # type: ignore[attr-defined]
        tau = self.config.eva.tau
        return Collector(self.model, layers, needed, self.forward, self.mask, tau)

    def _ranks(self, found: Mapping[str, Found]) -> dict[str, int]:
        ratios = {name: each.ratios[: self._components(name)] for name, each in found.items()}
        before = {name: target.r for name, target in self.targets.items()}
        return redistribute(ratios, before, self.config.eva.rho)

    def _components(self, name: str) -> int:
        """Returns the components of a layer that may be taken."""
        k, n = self.layers[name].linear_map.shape
        return min(components_for(self.targets[name].r, self.config.eva.rho, k), n)


def _ignore(name: str, layer: Any, x: Array) -> None:
    """Listens to a layer whose input another one tells."""


def _refuse_unsuited(name: str, layer: Carrier) -> None:
    reason = None
    if not isinstance(layer.linear_map, Matmul):
        reason = f"a {layer.linear_map.kind}, and EVA is for linear layers"
    elif len(layer.matrix.shape) > 2:
        reason = "a stack of layers, and EVA gives each layer a rank of its own"
    if reason:
        raise TargetError(
            f"{name} is {reason}: leave it out with lora.exclude_modules, or write "
            "init_lora_weights: true"
        )


class _Batch(NamedTuple):
    value: Any
    again: bool


def _endless(batches: Iterable[Any]) -> Iterator[_Batch]:
    """Yields the batches, and again from the first where they end; an iterator's are kept."""
    kept = []
    count = 0
    for batch in batches:
        if isinstance(batches, Iterator):
            kept.append(batch)
        count += 1
        yield _Batch(batch, again=False)
    if count == 0:
        raise ValueError("batches is empty: EVA needs at least one")
    while True:
        for batch in kept or batches:
            yield _Batch(batch, again=True)
