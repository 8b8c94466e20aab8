"""EVA on a Linen model: batches decide the ranks and the first values of A."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from flax import linen
from jaxtyping import Array, Key

from lorax.adapters.eva import first_values
from lorax.adapters.linen.apply import Traced, adapt, targets_of
from lorax.adapters.linen.model import TRAINED, AdaptedModel
from lorax.adapters.linen.recorder import Collector, Forward, Heard, readers_of_one_input
from lorax.adapters.linen.trace import Inputs
from lorax.adapters.linen.tree import replaced
from lorax.adapters.nnx.arguments import as_rngs
from lorax.adapters.recording import RowMask
from lorax.adapters.search import Suited, check_is_eva, endless, search, without_eva
from lorax.config.adapter import LoraConfig


def initialize_eva(
    model: linen.Module,
    variables: Mapping[str, Any],
    config: LoraConfig,
    batches: Iterable[Any],
    forward: Forward,
    *,
    mask: RowMask | None = None,
    rngs: int | Key[Array, ""],
) -> tuple[AdaptedModel, dict[str, Any]]:
    """Returns what `apply_lora` does, with `init_lora_weights: eva`; see `lorax.initialize_eva`.

    Args:
        model: As of `apply_lora`.
        variables: Likewise; they stay as they were.
        config: PEFT's settings, with `init_lora_weights="eva"`.
        batches: Trees of arrays, of few shapes: each new shape is compiled.
        forward: ``(model, batch)``: calls the model, such as ``lambda model, batch:
            model(batch["x"])``. The call takes what `model.apply` does after the variables:
            `method`, `rngs`, `mutable` and the model's own arguments.
        mask: ``batch -> mask``: which rows count, in the shape of the layers' inputs without
            features; all if not given.
        rngs: As of `apply_lora`.

    Raises:
        TypeError: If an argument is something else.
        TargetError: As `apply_lora`; if a target is a convolution or stacked, or `forward` does not
            call it.
        ValueError: If there is no batch, a mask does not fit, inputs do not vary enough or do not
            arrive, or their directions do not converge.

    Source: Paischer et al. 2024, "One Initialization to Rule them All", §3,
        https://arxiv.org/abs/2410.07170; the loop is that of PEFT 0.21 (`get_eva_state_dict`).
    """
    if not callable(forward):
        raise TypeError(
            "forward must be a function (model, batch), such as lambda model, batch: "
            f"model(batch['x']), got {type(forward).__name__}"
        )
    keys = as_rngs(rngs)
    source = endless(batches)
    first = next(source)
    inputs = Inputs((first.value,), {}, forward=forward)
    traced = Traced.of(model, variables, config, inputs)
    check_is_eva(config, "lorax.linen.apply_lora")
    targets = targets_of(traced.modules, config)
    names = [target.name for target in targets]
    maps = {name: traced.map_of(name) for name in names}
    stacked = {name: bool(traced.modules[name].stack) for name in names}
    suited = Suited.of(targets, config, maps, stacked)
    layers = {n: Heard(traced.modules[n].path, each) for n, each in suited.maps.items()}

    def collector(components: dict[str, int]) -> Collector:
        tau = config.eva.tau
        return Collector(model, traced.variables, layers, components, forward, mask, tau)

    groups = readers_of_one_input(model, traced.variables, layers, inputs)
    ranks, directions = search(suited, groups, collector, itertools.chain([first], source))
    adapted, begun = adapt(traced, without_eva(config), keys, suited.with_ranks(ranks))
    trained = begun[TRAINED]
    for layer in adapted.layers:
        if layer.name in directions:
            r = ranks[layer.name]
            a = first_values(directions[layer.name], r, whiten=config.eva.whiten)
            trained = replaced(trained, (*layer.path, "lora_a"), a)
    return adapted, {**begun, TRAINED: trained}
