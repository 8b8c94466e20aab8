"""LoRA on a Linen model: which layers, and what they begin with."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen, nnx
from flax.core import meta, unfreeze
from jaxtyping import Array, Key

from lorax.adapters import stack
from lorax.adapters.linen.model import FIXED, TRAINED, AdaptedModel, Layer
from lorax.adapters.linen.trace import Found, Inputs, check_reached, find_modules
from lorax.adapters.linen.tree import dotted, get, leaves, put, value_at
from lorax.adapters.method import Shape, Spec
from lorax.adapters.methods import spec_of
from lorax.adapters.nnx.arguments import as_rngs
from lorax.adapters.ranks import check_rank, without_narrow
from lorax.adapters.tables import tables_of
from lorax.adapters.targets import (
    Target,
    TargetError,
    is_all_linear,
    is_excluded,
    is_saved,
    is_target,
    match_targets,
    refuse_patterns,
)
from lorax.adapters.tokens import token_spec
from lorax.config.adapter import EVA, LoraConfig
from lorax.layers.maps import Map
from lorax.system.arguments import check_kind


def apply_lora(
    model: linen.Module,
    variables: Mapping[str, Any],
    config: LoraConfig,
    *args: Any,
    rngs: int | Key[Array, ""],
    method: Any = None,
    **kwargs: Any,
) -> tuple[AdaptedModel, dict[str, Any]]:
    """Returns a model with adapters on its layers, and its variables with theirs.

    The model is traced once on the example inputs, because Linen's layers have no shapes before;
    nothing is computed. What trains is the collection ``lora``: A and B, float32, at the place of
    their layer; and, under their own names, the model's parameters that `bias` and
    `modules_to_save` name, which take the place of those in ``params``. These are float32 where
    their module declares a compute dtype, so that small updates are not rounded away. ``params``
    is the base, whose arrays are those that were given.

    Args:
        model: A Linen model that holds `Dense`, `DenseGeneral`, `Einsum`, `Embed` or `Conv` layers,
            in `nn.scan`, `nn.vmap` and `nn.remat` or not.
        variables: From ``model.init``, or a checkpoint.
        config: PEFT's settings. Names of modules are their paths, joined by dots.
        args: Example inputs, as of ``model.apply(variables, *args, **kwargs)``, or their shapes.
        rngs: A seed or a key, of the A matrices.
        method: As of `model.apply`.
        kwargs: As `args`.

    Raises:
        TypeError: If one of them is something else.
        TargetError: If a setting matches nothing or something that cannot carry an adapter, or
            that the inputs do not lead to; if the variables have adapters already, a rank exceeds
            a layer's dimensions, or `init_lora_weights` is `eva`.
    """
    traced = Traced.of(model, variables, config, Inputs(args, kwargs, method))
    if config.init_lora_weights == EVA:
        raise TargetError(
            "init_lora_weights: eva needs batches of data, which decide the ranks: call "
            "lorax.linen.initialize_eva(model, variables, config, batches, forward, rngs=rngs) in "
            "the place of apply_lora"
        )
    return adapt(traced, config, as_rngs(rngs))


def apply_saved(
    model: linen.Module, variables: Mapping[str, Any], config: LoraConfig, inputs: Inputs
) -> tuple[AdaptedModel, dict[str, Any]]:
    """Returns what `apply_lora` does, for the values of a file.

    Its ranks may exceed a layer's dimensions: those of ``peft-portable`` are the largest of all
    layers, and those of PiSSA and OLoRA are doubled.

    Raises:
        TypeError: As `apply_lora`.
        TargetError: As `apply_lora`, but of ranks.
    """
    traced = Traced.of(model, variables, config, inputs)
    return adapt(traced, config, as_rngs(0), check=lambda shape, target: None)


@dataclasses.dataclass(frozen=True)
class Traced:
    """A model that was traced, with its variables.

    Attributes:
        model: The model.
        variables: Its variables.
        inputs: What it was traced on.
        modules: Its modules by dotted name.
    """

    model: linen.Module
    variables: dict[str, Any]
    inputs: Inputs
    modules: dict[str, Found]

    @classmethod
    def of(cls, model: Any, variables: Any, config: Any, inputs: Inputs) -> "Traced":
        """Checks the arguments of `apply_lora`, and traces the model.

        Raises:
            TypeError: If one of them is something else.
            TargetError: If the model carries adapters.
        """
        variables = _checked(model, variables, config)
        rest = {name: value for name, value in variables.items() if name != "params"}
        return cls(model, variables, inputs, find_modules(model, variables["params"], rest, inputs))

    def map_of(self, name: str) -> Map:
        """Returns the linear map of a layer that can carry an adapter."""
        linear_map = self.modules[name].linear_map
        assert linear_map is not None
        return linear_map


def adapt(
    traced: Traced,
    config: LoraConfig,
    rngs: nnx.Rngs,
    targets: list[Target] | None = None,
    *,
    check: Callable[[Shape, Target], None] = check_rank,
) -> tuple[AdaptedModel, dict[str, Any]]:
    """Returns a model as `apply_lora` does, with the adapters of some targets.

    Args:
        traced: The model.
        config: The settings of all else.
        rngs: Source of the A matrices.
        targets: What carries an adapter; None: what `targets_of` returns.
        check: Refuses a rank.

    Raises:
        TargetError: As `apply_lora`.
    """
    model = traced.model
    modules = traced.modules
    rest = dict(traced.variables)
    params = rest.pop("params")
    targets = targets_of(modules, config) if targets is None else targets
    for target in targets:
        check(Shape(*traced.map_of(target.name).shape), target)
    specs = _specs(modules, targets, config)
    chosen = {name: modules[name] for name in specs}
    check_reached(model, params, rest, traced.inputs, chosen)
    trained: dict[str, Any] = {}
    for path in _base_to_train(modules, params, targets, config):
        entry = modules.get(dotted(path[:-1]))
        trained = put(trained, path, _trainable(params, path, entry))
    fixed: dict[str, Any] = {}
    layers = [_layer(name, traced, spec) for name, spec in specs.items()]
    for layer in layers:
        w = layer.linear_map.matrix(value_at(params, (*layer.path, layer.weight)))
        begun = stack.start(layer.spec, w, rngs.params(), layer.linear_map.kind)
        for name, value in begun.params.items():
            trained = put(trained, (*layer.path, name), value)
        for name, value in begun.fixed.items():
            fixed = put(fixed, (*layer.path, name), value)
    can_carry = {name: entry.can_carry for name, entry in modules.items()}
    adapted = AdaptedModel(model, tuple(layers), modules=can_carry)
    more = {FIXED: fixed} if fixed else {}
    return adapted, {"params": params, **rest, TRAINED: trained, **more}


def targets_of(modules: Mapping[str, Found], config: LoraConfig) -> list[Target]:
    """Returns what the settings adapt among the modules of a model.

    Raises:
        TargetError: As `apply_lora`.
    """
    refuse_patterns(config, modules.keys())
    _refuse_odd_layers(modules, config)
    shapes = {
        name: Shape(*entry.linear_map.shape)
        for name, entry in modules.items()
        if entry.linear_map is not None and entry.can_carry
    }
    left_out = {name for name in shapes if name == "lm_head" or _is_by_name_only(modules[name])}
    others = modules.keys() - shapes.keys()
    targets = match_targets(list(shapes), others, config, left_out=left_out)
    if is_all_linear(config):

        def is_repeated(name: str) -> bool:
            inside = name.rpartition(".")[0]
            return bool(modules[name].stack or re.search(r"\d", inside))

        targets = without_narrow(targets, shapes, is_repeated)
    return targets


def _refuse_odd_layers(modules: Mapping[str, Found], config: LoraConfig) -> None:
    """Refuses layers that would be targets but cannot be adapted, or that no input leads to."""
    for name, entry in modules.items():
        left_out = {name} if _is_by_name_only(entry) else set()
        if is_excluded(name, config) or not is_target(name, config, left_out):
            continue
        reason = entry.obstacle
        if not entry.called:
            reason = (
                "the example inputs do not lead to it. Give inputs, or a method (of initialize_eva "
                "a forward), that call it, or leave it out with lora.exclude_modules"
            )
            raise TargetError(f"{name} cannot be adapted: {reason}")
        if reason:
            raise TargetError(
                f"{name} cannot be adapted: {reason}. Leave it out with lora.exclude_modules"
            )


def _is_by_name_only(entry: Found) -> bool:
    return entry.site is not None and entry.site.by_name_only


def _specs(
    modules: Mapping[str, Found], targets: list[Target], config: LoraConfig
) -> dict[str, Spec]:
    """Returns the adapter of every layer that has one, by name: targets, then tables of tokens."""
    specs = {target.name: spec_of(target, config) for target in targets}
    kinds = {name: e.linear_map.kind for name, e in modules.items() if e.linear_map is not None}
    embeddings = [name for name, kind in kinds.items() if kind == "lookup"]
    carriers = {name for name in kinds if modules[name].can_carry}
    tables = tables_of(list(modules), embeddings, carriers, {}, config, list(specs))
    return specs | {name: token_spec(kinds[name], ids) for name, ids in tables.items()}


def _layer(name: str, traced: Traced, spec: Spec) -> Layer:
    entry = traced.modules[name]
    linear_map = traced.map_of(name)
    if reason := spec.method.obstacle(spec, linear_map.kind, Shape(*linear_map.shape)):
        raise TargetError(f"{name} cannot carry {spec.method.name}: {reason}")
    assert entry.site is not None
    return Layer(entry.path, spec, linear_map, entry.site.weight, entry.stack)


def _base_to_train(
    modules: Mapping[str, Found],
    params: Mapping[str, Any],
    targets: list[Target],
    config: LoraConfig,
) -> list[tuple[str, ...]]:
    """Returns the paths of the model's own parameters that train."""
    adapted = {target.name for target in targets}
    saved = [n for n in modules if any(is_saved(n, e) for e in config.modules_to_save or ())]
    paths = [path for path, _ in leaves(params)]
    biases = [path for path in paths if path[-1] == "bias"]
    if config.bias == "lora_only":
        biases = [path for path in biases if dotted(path[:-1]) in adapted]
    if config.bias != "none" and not biases:
        where = "the model" if config.bias == "all" else "a target module"
        raise TargetError(f"lora.bias is {config.bias!r} but no layer of {where} has a bias")
    inside = tuple(f"{name}." for name in saved)
    wanted = set(biases if config.bias != "none" else ())
    return [path for path in paths if path in wanted or dotted(path).startswith(inside)]


def _trainable(params: Any, path: tuple[str, ...], entry: Found | None) -> Any:
    """Returns the value with which a parameter of the model begins to train, in its box."""
    value = value_at(params, path)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TargetError(f"{dotted(path)} cannot train: its dtype is {value.dtype}")
    wide = value.astype(jnp.float32) if entry is not None and entry.has_dtype else value
    return meta.replace_boxed(get(params, path), wide)


def _checked(model: Any, variables: Any, config: Any) -> dict[str, Any]:
    if not isinstance(model, linen.Module):
        is_nnx = isinstance(model, nnx.Module)
        advice = "; of an nnx.Module, call lorax.apply_lora" if is_nnx else ""
        if isinstance(model, AdaptedModel):
            raise TargetError("the model carries adapters already; merge_lora them first")
        raise TypeError(f"model must be a flax.linen.Module, got {type(model).__name__}{advice}")
    if not isinstance(config, LoraConfig):
        advice = ": write lorax.LoraConfig(**config)" if isinstance(config, Mapping) else ""
        kind = type(config).__name__
        raise TypeError(f"config must be a lorax.LoraConfig, got {kind}{advice}")
    check_kind("variables", variables, Mapping, "the variables of model.init, {'params': …}")
    if "params" not in variables:
        names = ", ".join(map(repr, variables)) or "nothing"
        raise TypeError(
            f"variables must hold 'params', as of model.init, got {names}; of parameters alone, "
            "pass {'params': parameters}"
        )
    if taken := sorted({TRAINED, FIXED} & set(variables)):
        raise TargetError(
            f"variables have a collection {taken[0]!r} already, as of an adapted model: merge_lora "
            "it first, or pass {'params': variables['params']}"
        )
    return dict(unfreeze(variables))
