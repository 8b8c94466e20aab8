"""Learning rates by parameter: LoRA+ and modules that are trained whole."""

import math
from collections.abc import Collection, Mapping
from typing import Literal

import jax
import optax
from jaxtyping import PyTree

from lorax.adapters.methods import METHODS
from lorax.adapters.tokens import EMBEDDING_TOKENS, HEAD_TOKENS
from lorax.config.train import TrainConfig
from lorax.system.wording import show

type Group = Literal["lora_b", "lora_embedding", "modules_to_save", "others"]
type Path = tuple[str | int, ...]

EMBEDDINGS = ("embed_tokens",)
"""Names of embedding modules in lorax's models. A tree of parameters does not tell its modules."""

ADAPTER_PARAMETERS: Mapping[str | int, str] = {
    name: parameter.axes
    for method in (*METHODS, EMBEDDING_TOKENS, HEAD_TOKENS)
    for name, parameter in method.parameters.items()
}
"""The axes of what trains in an adapter, by name."""

_MEANING: Mapping[str, tuple[str, str]] = {
    "lora_b": ("a B of an adapter (lora_b)", "apply_lora the model"),
    "lora_embedding": ("an adapter on an embedding", "adapt one"),
    "modules_to_save": (
        "a module that is trained whole",
        "begin an adapter with lora.modules_to_save",
    ),
}
"""The parameters of a group, and how to have some."""


def scale_learning_rates(
    *,
    lora_b: float | None = None,
    lora_embedding: float | None = None,
    modules_to_save: float | None = None,
    embeddings: str | Collection[str] = EMBEDDINGS,
) -> optax.GradientTransformation:
    """Multiplies the updates of a group of parameters: ``u ← factor · u``.

    Chain it behind an optimizer, as in ``optax.chain(adamw, scale_learning_rates(lora_b=16))``:
    then each group has ``factor`` times the optimizer's learning rate, in its decoupled weight
    decay too. It has no state.

    Args:
        lora_b: Factor of every B, and of every vector (biases, norms), as in PEFT: LoRA+.
        lora_embedding: Factor of the A and B of adapters on embeddings, which `lora_b` leaves out.
        modules_to_save: Factor of what is trained whole. Without it a matrix has the optimizer's
            rate and a vector that of B.
        embeddings: The last names of embedding modules.

    Returns:
        An optax transformation of the parameters of a model from `apply_lora`. Its `init` raises
        `ValueError` if a factor is given and no parameter is in its group.

    Raises:
        ValueError: If a factor is not a finite number above 0.

    Source: Hayou et al. 2024, "LoRA+", https://arxiv.org/abs/2402.12354
    """
    given: dict[Group, float | None] = {
        "lora_b": lora_b,
        "lora_embedding": lora_embedding,
        "modules_to_save": modules_to_save,
    }
    factors: dict[Group, float] = {g: factor for g, factor in given.items() if factor is not None}
    needed: dict[Group, str] = {group: group for group in factors}
    for group, factor in factors.items():
        number = isinstance(factor, int | float) and not isinstance(factor, bool)
        if not (number and math.isfinite(factor) and factor > 0):
            raise ValueError(f"{group} must be a finite number > 0, got {show(factor)}")
    names = (embeddings,) if isinstance(embeddings, str) else tuple(embeddings)
    return _scale(factors, needed, names)


def scale_by_settings(train: TrainConfig) -> optax.GradientTransformation | None:
    """Returns `scale_learning_rates` as the settings of a run ask for it; None if they do not.

    Args:
        train: Learning rates; that of a group is the highest of the schedule, whose shape it keeps.
    """
    factors: dict[Group, float] = {}
    needed: dict[Group, str] = {}
    if train.loraplus_lr_ratio is not None:
        factors["lora_b"] = train.loraplus_lr_ratio
        needed["lora_b"] = "train.loraplus_lr_ratio"
        factors["lora_embedding"] = train.loraplus_lr_embedding / train.learning_rate
        if train.loraplus_lr_embedding != TrainConfig().loraplus_lr_embedding:
            needed["lora_embedding"] = "train.loraplus_lr_embedding"
    if train.modules_to_save_learning_rate is not None:
        factors["modules_to_save"] = train.modules_to_save_learning_rate / train.learning_rate
        needed["modules_to_save"] = "train.modules_to_save_learning_rate"
    return _scale(factors, needed, EMBEDDINGS) if factors else None


def groups_of(params: PyTree, embeddings: Collection[str] = EMBEDDINGS) -> dict[Path, Group]:
    """Returns the group of each parameter by its path.

    What is attached to an embedding is `lora_embedding`, other Bs are `lora_b`. What is attached to
    nothing is trained whole (`modules_to_save`), except a bias that trains without its module's
    weight: that is one of `lora.bias`, and belongs to the `others`.
    """
    paths = [_names(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    of_module: dict[Path, int] = {}
    for path in paths:
        if _module_adapted(path) is None:
            of_module[path[:-1]] = of_module.get(path[:-1], 0) + 1

    def group_of(path: Path) -> Group:
        module = _module_adapted(path)
        if module is None:
            alone = path[-1] == "bias" and of_module[path[:-1]] == 1
            return "others" if alone else "modules_to_save"
        if module in embeddings:
            return "lora_embedding"
        return "lora_b" if path[-1] == "lora_b" else "others"

    return {path: group_of(path) for path in paths}


def _module_adapted(path: Path) -> str | int | None:
    """Returns the name of the module whose adapter has a parameter; None of a module's own.

    NNX's adapters are what is attached to a module. Linen's parameters lie at the module's place,
    beside those that train whole.
    """
    if "attached" in path:
        return path[path.index("attached") - 1]
    if path[-1] in ADAPTER_PARAMETERS:
        return path[-2] if len(path) > 1 else ""
    return None


def _is_vector(path: Path, update: jax.Array) -> bool:
    """Says whether a parameter is a vector, of a module or of each of stacked ones."""
    adapts = _module_adapted(path) is not None
    return len(ADAPTER_PARAMETERS[path[-1]]) == 1 if adapts else update.ndim == 1


def _scale(
    factors: Mapping[Group, float], needed: Mapping[Group, str], embeddings: Collection[str]
) -> optax.GradientTransformation:
    """Returns the transformation; `needed` names the setting of each group that must exist."""

    def init(params: PyTree) -> optax.OptState:
        found = set(groups_of(params, embeddings).values())
        for group, setting in needed.items():
            if group not in found:
                what, remedy = _MEANING[group]
                raise ValueError(f"{setting} needs {what}, and none trains: remove it, or {remedy}")
        return optax.EmptyState()

    def update(
        updates: PyTree, state: optax.OptState, params: PyTree = None
    ) -> tuple[PyTree, optax.OptState]:
        del params
        groups = groups_of(updates, embeddings)

        def scale(path, update: jax.Array) -> jax.Array:
            names = _names(path)
            group = groups[names]
            if group not in factors and _is_vector(names, update):  # PEFT gives them the rate of B
                group = "lora_b"
            return update * factors[group] if group in factors else update

        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(init, update)


def _names(path: tuple) -> Path:
    """Returns the names of a leaf's path, without the `.value` of an NNX variable."""
    names = tuple(
        getattr(key, "key", getattr(key, "name", getattr(key, "idx", ""))) for key in path
    )
    return names[:-1] if names[-1:] == ("value",) else names
