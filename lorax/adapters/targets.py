"""The modules that a `LoraConfig` adapts: dotted names, matched as PEFT does."""

import dataclasses
import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Sequence

from lorax.adapters.patterns import SECONDS, Pattern, find_slow
from lorax.config.adapter import LoraConfig
from lorax.system.wording import clip, show

_REGEX_HINT = (
    ". A string is a regular expression over whole module names; for name endings write a list, "
    "such as [q_proj]"
)


class TargetError(ValueError):
    """A LoRA setting names something that the model does not have, or cannot adapt."""


@dataclasses.dataclass(frozen=True)
class Target:
    """One module to adapt.

    Attributes:
        name: Dotted path from the model's root, as in ``model.layers.0.self_attn.q_proj``.
        r: Rank of the update.
        lora_alpha: Numerator of its scale.
        scale: ``lora_alpha / r``, or ``lora_alpha / √r`` with `use_rslora`.
    """

    name: str
    r: int
    lora_alpha: float
    scale: float


def match_targets(
    linear_names: Sequence[str],
    other_names: Collection[str],
    config: LoraConfig,
    *,
    left_out: Collection[str] = (),
) -> list[Target]:
    """Selects the modules that `config` adapts, in the order of `linear_names`.

    A string `target_modules` must match a whole name as a regular expression; an entry of a list
    matches the whole name or a dotted suffix of it; ``all-linear`` takes every one but `left_out`.
    Excluded and fully trained modules never match, but see `is_saved`.

    Args:
        linear_names: Dotted names of the modules that can carry an adapter.
        other_names: Dotted names of all other modules; matching one is an error.
        config: What to match.
        left_out: Those of the first that ``all-linear`` leaves out: the head, embeddings,
            convolutions.

    Raises:
        TargetError: If an entry of any setting matches nothing, or a module matches that is not
            linear (the message lists near names), a module would be trained whole and carry an
            adapter, or a regular expression takes too long.

    Source: the behaviour of PEFT 0.21 (`check_target_module_exists`).
    """
    refuse_patterns(config, {*linear_names, *other_names})
    excluded = {n for n in (*linear_names, *other_names) if is_excluded(n, config)}
    matched = [n for n in linear_names if n not in excluded and is_target(n, config, left_out)]
    if not is_all_linear(config):
        wrong = sorted(n for n in other_names if n not in excluded and is_target(n, config, ()))
        if wrong:
            raise TargetError(
                f"lora.target_modules matches {_listed(wrong)}, which cannot carry an adapter: "
                "only layers that multiply by a weight can. Narrow the entry, or train the module "
                "fully with lora.modules_to_save"
            )
    _refuse_unmatched(matched, linear_names, other_names, config, left_out)
    _refuse_trained_twice(matched, (*linear_names, *other_names), config)
    return [_sized(name, config) for name in matched]


def is_all_linear(config: LoraConfig) -> bool:
    """Says whether `target_modules` is the word for every linear layer, in any case as in PEFT."""
    targets = config.target_modules
    return isinstance(targets, str) and targets.lower() == "all-linear"


def is_excluded(name: str, config: LoraConfig) -> bool:
    """Says whether `exclude_modules` or `modules_to_save` keeps an adapter off `name`."""
    exclude = config.exclude_modules
    if isinstance(exclude, str):
        if re.fullmatch(exclude, name):
            return True
    elif exclude and any(_is_suffix(entry, name) for entry in exclude):
        return True
    return any(re.match(_below(m), name) for m in config.modules_to_save or ())


def is_target(name: str, config: LoraConfig, left_out: Collection[str]) -> bool:
    """Says whether `target_modules`, with the layer settings, takes `name`."""
    targets = config.target_modules
    if isinstance(targets, str):
        if is_all_linear(config):
            return name not in left_out
        return re.fullmatch(targets, name) is not None
    if name in targets:
        return True  # PEFT lets a full name pass the layer settings too
    return any(_is_suffix(t, name) for t in targets) and _is_in_layers(name, config)


def is_saved(name: str, entry: str) -> bool:
    """Says whether an entry of `modules_to_save` ends this module's name, at a dot or not.

    Source: the behaviour of PEFT 0.21 (`_set_trainable`): ``norm`` takes ``input_layernorm`` too.
    """
    return name.endswith(entry)


def pattern_value[T](patterns: dict[str, T], name: str, default: T) -> T:
    """Returns the value of the first pattern, in order, that matches the end of `name`."""
    for pattern, value in patterns.items():
        if re.match(_ending(pattern), name):
            return value
    return default


def nearest(entry: str, names: Iterable[str], listed: str | Iterable[str] = ()) -> str:
    """Returns a sentence listing the known names closest to `entry`.

    Args:
        entry: What matches nothing.
        names: Of the model's modules.
        listed: The other entries; what they match already was not meant by this one. A text is
            a regular expression, which has no others.
    """
    parts = 2 if "." in entry.strip(".*") else 1
    suffixes = sorted({".".join(n.split(".")[-parts:]) for n in names})
    others = () if isinstance(listed, str) else [other for other in listed if other != entry]
    free = [n for n in suffixes if not any(_is_suffix(other, n) for other in others)]
    close = difflib.get_close_matches(re.sub(r"[^\w.]", "", entry), free, n=3, cutoff=0.5)
    known = close or suffixes
    if not known:
        return "the model has none"
    return ("did you mean " if close else "the model has ") + _listed(known)


def _below(module: str) -> str:
    return rf"(^|.*\.){module}($|\..*)"


def _ending(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _inside(layer_list: str) -> str:
    return rf"(?:^|.*?\.){layer_list}\.(?P<index>\d+)\."


def _layer_lists(config: LoraConfig) -> tuple[str, ...]:
    patterns = config.layers_pattern
    return (patterns,) if isinstance(patterns, str) else tuple(patterns or ())


def _patterns(config: LoraConfig) -> Iterator[Pattern]:
    """Yields every regular expression of the settings, as it is matched."""
    for setting in ("target_modules", "exclude_modules"):
        if isinstance(entry := getattr(config, setting), str):
            yield Pattern(setting, entry, entry)
    for setting, entries, whole in (
        ("modules_to_save", config.modules_to_save or (), _below),
        ("layers_pattern", _layer_lists(config), _inside),
        ("rank_pattern", config.rank_pattern, _ending),
        ("alpha_pattern", config.alpha_pattern, _ending),
    ):
        for entry in entries:
            yield Pattern(setting, entry, whole(entry))


def _is_suffix(entry: str, name: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def _layer_index(name: str, config: LoraConfig) -> int | None:
    patterns = _layer_lists(config)
    if not patterns:
        match = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", name)
    else:
        tries = (re.match(_inside(pattern), name) for pattern in patterns)
        match = next((m for m in tries if m), None)
    return int(match["index"]) if match else None


def _layers(config: LoraConfig) -> tuple[int, ...]:
    layers = config.layers_to_transform
    return (layers,) if isinstance(layers, int) else tuple(layers or ())


def _is_in_layers(name: str, config: LoraConfig) -> bool:
    layers = _layers(config)
    return not layers or _layer_index(name, config) in layers


def _sized(name: str, config: LoraConfig) -> Target:
    r = pattern_value(config.rank_pattern, name, config.r)
    alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
    return Target(name, r, alpha, scale_of(alpha, r, config))


def scale_of(lora_alpha: float, r: int, config: LoraConfig) -> float:
    """Returns the scale of an update of rank r."""
    return lora_alpha / (r**0.5 if config.use_rslora else r)


def refuse_patterns(config: LoraConfig, names: Collection[str]) -> None:
    """Raises `TargetError` if a regular expression is none, or takes too long."""
    patterns = tuple(_patterns(config))
    for pattern in patterns:
        try:
            re.compile(pattern.whole)
        except (re.error, OverflowError, RecursionError) as error:
            raise TargetError(
                f"lora.{pattern.setting}: {show(pattern.entry)} is no regular expression: "
                f"{clip(str(error))}"
            ) from None
    if slow := find_slow(patterns, frozenset(names)):
        raise TargetError(
            f"lora.{slow.setting}: matching {show(slow.entry)} with the names of the modules "
            f"takes more than {SECONDS} s; repeat fewer things in it, or list name endings"
        )


def _refuse_unmatched(matched, linear_names, other_names, config, left_out):
    """Raises unless every entry of every setting names something, and something is adapted."""
    names = (*linear_names, *other_names)
    targets = config.target_modules
    for entry in (targets,) if isinstance(targets, str) else targets:
        alone = config
        if not isinstance(targets, str):
            alone = config.model_copy(update={"target_modules": (entry,)})
        if any(is_target(n, alone, left_out) for n in linear_names):
            continue
        anywhere = alone.model_copy(update={"layers_to_transform": None, "layers_pattern": None})
        found = [n for n in linear_names if is_target(n, anywhere, left_out)]
        if found:
            _refuse_layers(config, found, linear_names)
        else:
            raise TargetError(
                f"lora.target_modules: {show(entry)} matches no linear module; "
                f"{nearest(entry, linear_names, targets)}"
                f"{_REGEX_HINT if isinstance(targets, str) and not is_all_linear(config) else ''}"
            )
    exclude = config.exclude_modules
    for entry in (exclude,) if isinstance(exclude, str) else exclude or ():
        match = re.fullmatch if isinstance(exclude, str) else _is_suffix
        if not any(match(entry, n) for n in names):
            raise TargetError(
                f"lora.exclude_modules: {show(entry)} matches no module; "
                f"{nearest(entry, names, exclude)}"
            )
    in_layers = [n for n in linear_names if is_target(n, config, left_out)]
    _refuse_layers(config, in_layers, linear_names)
    if not matched:
        raise TargetError(
            "lora.exclude_modules and lora.modules_to_save leave no module to adapt; narrow them"
        )
    for setting in ("rank_pattern", "alpha_pattern"):
        for entry in getattr(config, setting):
            if not any(pattern_value({entry: True}, n, False) for n in matched):
                raise TargetError(
                    f"lora.{setting}: {show(entry)} matches no target module; "
                    f"{nearest(entry, matched, getattr(config, setting))}"
                )
    for entry in config.modules_to_save or ():
        if not any(is_saved(n, entry) for n in names):
            raise TargetError(
                f"lora.modules_to_save: {show(entry)} matches no module; "
                f"{nearest(entry, names, config.modules_to_save)}"
            )


def _refuse_trained_twice(matched: list[str], names: Iterable[str], config: LoraConfig) -> None:
    """Raises if a module that is trained whole holds an adapter, or another such module."""
    saved = {n: e for n in names for e in config.modules_to_save or () if is_saved(n, e)}
    for name, entry in sorted(saved.items()):

        def inside(others, name=name):
            return [n for n in others if f"{n}.".startswith(f"{name}.")]

        found = (
            f"lora.modules_to_save: {show(entry)} ends the name of {name}, as PEFT compares them"
        )
        if adapted := inside(matched):
            raise TargetError(
                f"{found}, but {_listed(adapted, 3)} of it would carry an adapter too. Write more "
                "of the names that are meant, or put what is to be trained whole into "
                "lora.exclude_modules"
            )
        if within := [n for n in inside(sorted(saved)) if n != name]:
            raise TargetError(
                f"{found}, and {show(saved[within[0]])} that of {within[0]} in it, which PEFT "
                "would then not train. Leave out the one or the other"
            )


def _refuse_layers(config: LoraConfig, targets: list[str], linear_names: Sequence[str]) -> None:
    """Raises if a layer of `layers_to_transform` has none of some targets."""
    for index in _layers(config):
        if not any(_layer_index(n, config) == index for n in targets):
            known = {i for n in linear_names if (i := _layer_index(n, config)) is not None}
            where = f"the model's layers are {_listed(sorted(known))}"
            if not known:
                where = "no layers are found; name the list that holds them in lora.layers_pattern"
            raise TargetError(
                f"lora.layers_to_transform: no target module lies in layer {index}; {where}"
            )


def _listed(names: Iterable, limit: int = 8) -> str:
    names = [clip(str(n)) for n in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
