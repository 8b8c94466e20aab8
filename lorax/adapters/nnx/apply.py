"""LoRA on a model: freeze, adapt, choose kernels and dropout."""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from lorax.adapters.method import Shape, Spec
from lorax.adapters.methods import spec_of
from lorax.adapters.nnx.adapter import DropoutKey, activate, attach
from lorax.adapters.nnx.arguments import as_rngs, check_arguments, refuse_other_adapters
from lorax.adapters.nnx.tree import (
    adapted_layers,
    layers_with_adapters,
    module_references,
    named_modules,
    set_child,
    tied_modules,
)
from lorax.adapters.ranks import check_rank, without_narrow
from lorax.adapters.sites import find_site, is_by_name_only, obstacle_of, shape_of
from lorax.adapters.stack import keys_of
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
from lorax.layers.carrier import Carrier, Frozen
from lorax.system.arguments import check_kind
from lorax_kernels import Kernels, check_kernels_name, dense


def set_kernels(model: nnx.Module, kernels: Kernels) -> None:
    """Sets what computes adapted layers, norms and loss, in place: ``auto``, ``pallas`` or ``xla``.

    Raises:
        ValueError: If `kernels` is none of these.
    """
    check_kernels_name(kernels)
    check_kind("model", model, nnx.Module, "an nnx.Module")
    modules: list[Any] = [model, *named_modules(model).values()]
    for module in modules:
        if getattr(module, "kernels", None) in get_args(Kernels.__value__):
            module.kernels = kernels


def apply_lora[M: nnx.Module](
    model: M, config: LoraConfig, *, rngs: nnx.Rngs | int | Key[Array, ""]
) -> M:
    """Returns `model` with adapters on its layers and every other weight frozen.

    The result shares the base weights' arrays with `model`, which stays as it was. Afterwards
    `nnx.Param` is exactly what trains: A and B (as `nnx.LoRAParam`), the biases that `bias` names,
    and `modules_to_save`; all else is `Frozen`. What trains is float32 where its module declares
    a compute dtype, so that small updates are not rounded away.

    Args:
        model: Any module tree holding `nnx.Linear`, `LinearGeneral`, `Einsum`, `Embed` or `Conv`
            layers, stacked by `nnx.vmap` or not, or layers of a `Site` of your own.
        config: PEFT's settings.
        rngs: Source of the A matrices (stream ``params``), or the seed or key of one.

    Raises:
        TypeError: If one of them is something else.
        TargetError: If a setting matches nothing or something that cannot carry an adapter, if
            the model is adapted already, or a rank exceeds a layer's dimensions.
    """
    check_arguments(model, config)
    rngs = as_rngs(rngs)
    if config.init_lora_weights == EVA:
        raise TargetError(
            "init_lora_weights: eva needs batches of data, which decide the ranks: call "
            "lorax.initialize_eva(model, config, batches, rngs=rngs) in the place of apply_lora"
        )
    return adapt(model, config, None, rngs)


def apply_saved[M: nnx.Module](model: M, config: LoraConfig) -> M:
    """Returns `model` with adapters as `apply_lora` puts them, for the values of a file.

    Its ranks may exceed a layer's dimensions: those of ``peft-portable`` are the largest of all
    layers, and those of PiSSA and OLoRA are doubled.

    Raises:
        TargetError: As `apply_lora`, but of ranks.
    """
    return adapt(model, config, None, nnx.Rngs(0), check=lambda shape, target: None)


def adapt[M: nnx.Module](
    model: M,
    config: LoraConfig,
    targets: list[Target] | None,
    rngs: nnx.Rngs,
    *,
    check: Callable[[Shape, Target], None] = check_rank,
) -> M:
    """Returns `model` as `apply_lora` does, with the adapters of some targets.

    Args:
        model: The base model.
        config: The settings of all else.
        targets: What carries an adapter; None: what `targets_of` returns.
        rngs: Source of the A matrices.
        check: Refuses a rank.

    Raises:
        TargetError: As `apply_lora`.
    """
    refuse_adapters(model)
    adapted = nnx.clone(model)
    modules = named_modules(adapted)
    targets = targets_of(adapted, config) if targets is None else targets
    tables = _tables_of(modules, tied_modules(adapted), config, targets)
    references = module_references(adapted)
    trained_biases = _biases_to_train(modules, targets, config)
    tied = tied_modules(adapted)
    saved = [
        modules[tied.get(name, name)]
        for name in (*modules, *tied)
        if any(is_saved(name, entry) for entry in config.modules_to_save or ())
    ]
    keep = {id(m) for root in saved for m in (root, *named_modules(root).values())}
    _freeze((adapted, *modules.values()), keep)
    for target in targets:
        layer = adopt(target.name, modules, references)
        check(Shape(*layer.linear_map.shape), target)
        _attach(target.name, layer, spec_of(target, config), rngs)
    for name, ids in tables.items():
        table = adopt(name, modules, references)
        _attach(name, table, token_spec(table.linear_map.kind, ids), rngs)
    for name in trained_biases:
        module = modules[name]
        bias = nnx.Param(_trainable_value(module, vars(module)["bias"]))
        set_child(module, "bias", bias)
    return adapted


def refuse_adapters(model: nnx.Module) -> None:
    """Raises `TargetError` if a model carries adapters, lorax's or others."""
    if carried := layers_with_adapters(model):
        merged = any(layer.merged for layer in carried.values())
        remedy = "unmerge_lora and then merge_lora it" if merged else "merge_lora or unload_lora it"
        raise TargetError(f"the model carries adapters already; {remedy} first")
    refuse_other_adapters(model)


def targets_of(model: nnx.Module, config: LoraConfig) -> list[Target]:
    """Returns what `apply_lora` would adapt, without adapting it; works on abstract models.

    Raises:
        TargetError: As `apply_lora`.
    """
    modules = named_modules(model)
    tied = tied_modules(model)
    # `match_targets` asks the same, and gets the same answer at once: what follows matches before.
    refuse_patterns(config, modules.keys() | tied.keys())
    _refuse_odd_layers(model, modules, config)
    linear = [n for n, m in modules.items() if shape_of(m)]
    left_out = {name for name in linear if name == "lm_head" or is_by_name_only(modules[name])}
    try:
        others = (modules.keys() | tied.keys()) - set(linear)
        found = match_targets(linear, others, config, left_out=left_out)
        return _without_narrow(found, modules) if is_all_linear(config) else found
    except TargetError as error:
        names = [
            f"{name} is tied to {source}, whose adapter or training is its own too"
            for name, source in tied.items()
            if name in str(error)
        ]
        raise TargetError("; ".join([str(error), *names])) from None


def _without_narrow(targets: list[Target], modules: dict[str, nnx.Module]) -> list[Target]:
    shapes = {target.name: shape_of(modules[target.name]) for target in targets}
    sized = {name: shape for name, shape in shapes.items() if shape is not None}
    return without_narrow(
        targets, sized, lambda name: any(part.isdigit() for part in name.split(".")[:-1])
    )


def _tables_of(
    modules: dict[str, nnx.Module], tied, config: LoraConfig, targets: list[Target]
) -> dict[str, tuple[int, ...]]:
    embeddings = [name for name, module in modules.items() if isinstance(module, nnx.Embed)]
    carriers = {name for name, module in modules.items() if shape_of(module)}
    names = [target.name for target in targets]
    return tables_of(list(modules), embeddings, carriers, tied, config, names)


def _refuse_odd_layers(model, modules: dict[str, nnx.Module], config: LoraConfig) -> None:
    """Refuses linear layers that would be targets but cannot be adapted, or cannot be found."""
    for name, module in modules.items():
        left_out = {name} if is_all_linear(config) and is_by_name_only(module) else set()
        wanted = is_target(name, config, left_out) and not is_excluded(name, config)
        if wanted and (reason := obstacle_of(module)):
            raise TargetError(
                f"{name} cannot be adapted: {reason}. Leave it out with lora.exclude_modules"
            )
    carriers = [module for module in modules.values() if isinstance(module, Carrier)]
    attached = [inner for layer in carriers for _, inner in nnx.iter_modules(layer)]
    known = {id(model), *map(id, modules.values()), *map(id, attached)}
    for path, module in nnx.iter_modules(model):
        if id(module) not in known:
            raise TargetError(
                f"{'.'.join(map(str, path))} is held in a tuple, list or dict, where its layers "
                "cannot be replaced; hold modules in nnx.List or nnx.Dict"
            )


def set_dropout_key(model: nnx.Module, key: Key[Array, ""]) -> None:
    """Gives every adapted layer its own dropout mask, a pure function of `key`, in place.

    Call it once a step with a fresh key; `make_train_step` does.
    """
    check_kind("model", model, nnx.Module, "an nnx.Module from apply_lora")
    check_kind("key", key, jax.Array, "a key, as of jax.random.key(0)")
    for index, layer in enumerate(adapted_layers(model).values()):
        if layer.adapter.dropout:
            own = keys_of(jax.random.fold_in(key, index), layer.matrix)
            layer.adapter.dropout_key = DropoutKey(own)


def use_adapter(model: nnx.Module, name: str | None) -> None:
    """Makes one attached adapter the active one of every layer that has it, in place.

    The active adapter trains; the others are frozen, and compute nothing.

    Args:
        model: A model from `apply_lora`.
        name: The adapter's; None: every layer computes what its base does.

    Raises:
        ValueError: If no layer has an adapter of that name, or one is merged.
    """
    layers = layers_with_adapters(model)
    if name is not None and not any(name in layer.attached for layer in layers.values()):
        known = ", ".join(sorted({n for layer in layers.values() for n in layer.attached}))
        raise ValueError(f"no layer has an adapter {name!r}; there is {known or 'none'}")
    for where, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{where} is merged; unmerge_lora first")
        activate(layer, name if name in set(layer.attached) else None)


def adopt(name: str, modules: dict[str, nnx.Module], references: Any) -> Carrier:
    """Returns the layer that carries a module's adapter, put in its place wherever it is held."""
    base = modules[name]
    found = find_site(base)
    assert found is not None
    layer = found[0].adopt(base)
    for parent, key in references[id(base)] if layer is not base else ():
        set_child(parent, key, layer)
    modules[name] = layer
    return layer


def _attach(name: str, layer: Carrier, spec: Spec, rngs: nnx.Rngs) -> None:
    linear_map = layer.linear_map
    if reason := spec.method.obstacle(spec, linear_map.kind, Shape(*linear_map.shape)):
        raise TargetError(f"{name} cannot carry {spec.method.name}: {reason}")
    attach(layer, spec, rngs.params())


def _biases_to_train(modules, targets: list[Target], config: LoraConfig) -> list[str]:
    if config.bias == "none":
        return []
    candidates = modules if config.bias == "all" else [t.name for t in targets]
    found = [n for n in candidates if getattr(modules[n], "bias", None) is not None]
    if not found:
        where = "the model" if config.bias == "all" else "a target module"
        raise TargetError(f"lora.bias is {config.bias!r} but no layer of {where} has a bias")
    return found


def _trainable_value(module: nnx.Module, variable: nnx.Variable) -> jax.Array:
    value = dense(variable.get_value())
    return value.astype(jnp.float32) if getattr(module, "dtype", None) is not None else value


def _freeze(modules: Iterable[nnx.Module], keep: set[int]) -> None:
    """Turns every parameter into `Frozen`, but those of the modules in `keep`."""
    replaced: dict[int, nnx.Variable] = {}
    for module in sorted(modules, key=lambda m: id(m) not in keep):
        for name, value in list(vars(module).items()):
            if not isinstance(value, nnx.Param | Frozen):
                continue
            if id(value) not in replaced:
                trains = id(module) in keep
                replaced[id(value)] = (
                    nnx.Param(_trainable_value(module, value))
                    if trains
                    else Frozen(value.get_value())
                )
            set_child(module, name, replaced[id(value)])


def fingerprint_adapters(model: nnx.Module) -> str:
    """Returns a SHA-256 of every adapted layer's name and adapter, but its values."""
    specs = {name: layer.adapter.spec for name, layer in adapted_layers(model).items()}
    found = [f"{name} {spec.method.identity(spec)}" for name, spec in sorted(specs.items())]
    return hashlib.sha256("\n".join(found).encode()).hexdigest()
