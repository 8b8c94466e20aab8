"""EVA on a model: batches decide the ranks and the first values of A."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Key

from lorax.adapters.eva import first_values
from lorax.adapters.nnx.apply import adapt, refuse_adapters, targets_of
from lorax.adapters.nnx.arguments import as_rngs, check_arguments
from lorax.adapters.nnx.directions import Collector
from lorax.adapters.nnx.recorder import Forward, carriers_of, readers_of_one_input
from lorax.adapters.nnx.tree import adapted_layers
from lorax.adapters.recording import RowMask
from lorax.adapters.search import (
    Suited,
    check_is_eva,
    endless,
    search,
    with_ranks,
    without_eva,
)
from lorax.config.adapter import LoraConfig
from lorax.layers.carrier import Carrier
from lorax_kernels import IGNORED


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
    check_is_eva(config, "lorax.apply_lora")
    refuse_adapters(model)
    if forward is None:
        _check_language_model(model)
        forward = run_language_model
        mask = mask or functools.partial(counted_tokens, learned=config.eva.use_label_mask)
    source = endless(batches)
    first = next(source)
    base = _Base.of(model, config, forward, mask)
    groups = base.groups(first.value)
    ranks, directions = search(
        base.suited, groups, base.collector, itertools.chain([first], source)
    )
    adapted = adapt(model, without_eva(config), base.suited.with_ranks(ranks), rngs)
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
    resized = with_ranks(targets_of(model, config), ranks, config)
    return adapt(model, without_eva(config), resized, rngs)


def ranks_of(model: nnx.Module) -> dict[str, int]:
    """Returns the rank of each adapted layer."""
    return {name: layer.adapter.spec.r for name, layer in adapted_layers(model).items()}


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
class _Base:
    """A copy of the base model, which tells its layers' inputs.

    Attributes:
        model: The copy.
        layers: Its layers that take part, by name.
        suited: What they would carry without EVA.
        forward: Runs the model.
        mask: Which rows count; None: all.
    """

    model: Any
    layers: dict[str, Carrier]
    suited: Suited
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
        targets = targets_of(model, config)
        layers = carriers_of(model, [target.name for target in targets])
        maps = {name: layer.linear_map for name, layer in layers.items()}
        stacked = {name: len(layer.matrix.shape) > 2 for name, layer in layers.items()}
        suited = Suited.of(targets, config, maps, stacked)
        return cls(model, {name: layers[name] for name in suited.linear}, suited, forward, mask)

    def groups(self, batch: Any) -> list[list[str]]:
        """Returns the names of the layers in groups that read one array."""
        return readers_of_one_input(self.model, self.layers, self.forward, batch)

    def collector(self, components: dict[str, int]) -> Collector:
        """Returns what collects the directions of some layers; the others tell nothing."""
        layers = {name: self.layers[name] for name in components}
        for name, layer in self.layers.items():
            if name not in layers:
                layer.listener = _ignore  # type: ignore[attr-defined]
        tau = self.suited.config.eva.tau
        return Collector(self.model, layers, components, self.forward, self.mask, tau)


def _ignore(name: str, layer: Any, x: Array) -> None:
    """Listens to a layer whose input another one tells."""
