"""The adapter's settings, with the names and meanings of PEFT's `LoraConfig`."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, override

from pydantic import BeforeValidator, Field, field_validator

from lorax.config.marks import OfStep
from lorax.config.types import (
    BelowOne,
    Conflict,
    Count,
    FromList,
    Index,
    Modules,
    Names,
    Section,
    Share,
    check_regex,
)
from lorax.system.wording import did_you_mean, show

Alpha = Annotated[float, Field(gt=0, le=1e6)]
"""Real ones end at a few thousand; far above, s·A·B is infinite after the first step."""


_STARTS = ("gaussian", "orthogonal", "pissa", "olora")

EVA = "eva"
"""The value of `init_lora_weights` that needs batches."""


def _check_start(value: Any) -> bool | str:
    if value is True:
        return True
    word = value.lower() if isinstance(value, str) else ""
    if word in (*_STARTS, EVA) or re.fullmatch(r"pissa_niter_\d{1,3}", word):
        return word
    known = "true, gaussian, orthogonal, pissa, pissa_niter_ with a number, olora or eva"
    found = "false" if value is False else show(value)
    raise ValueError(f"needs {known}, got {found}{did_you_mean(word, (*_STARTS, EVA))}")


Initialisation = Annotated[bool | str, BeforeValidator(_check_start)]
Tokens = Annotated[tuple[Index, ...], Field(min_length=1), FromList]


class EvaConfig(Section):
    """Settings of EVA, with the names and meanings of PEFT's `EvaConfig`.

    Attributes:
        rho: A layer's rank is at most ρ·r; 1 leaves every rank as it is.
        tau: A component has converged where the cosine of its directions before and after a batch
            is at least τ.
        use_label_mask: Only tokens that are learned count; otherwise all but padding.
        whiten: Divides each component by the root of its singular value.
        adjust_scaling_factors: Keeps the scale of a layer whose rank changes, by its alpha.
    """

    rho: Annotated[float, Field(ge=1)] = 2.0
    tau: Share = 0.99
    use_label_mask: bool = True
    whiten: bool = False
    adjust_scaling_factors: bool = True


class LoraConfig(Section):
    """The modules to adapt and how, with the names and meanings of PEFT's `LoraConfig`.

    Attributes:
        r: Rank of the update ``s · A·B``.
        lora_alpha: ``s = lora_alpha / r``, or ``lora_alpha / √r`` with `use_rslora`.
        lora_dropout: Probability with which an input of the adapter is dropped.
        target_modules: `all-linear`, a regular expression over whole module names, or a list of
            name endings.
        exclude_modules: The same, for modules that stay as they are.
        layers_to_transform: Indices of the layers to adapt; all when not given.
        layers_pattern: Name of the list that holds the layers.
        rank_pattern: Module pattern to its own rank.
        alpha_pattern: Module pattern to its own alpha.
        use_rslora: Rank-stabilised scale.
        bias: Which biases are trained.
        use_dora: DoRA: the length of every column trains too.
        lora_bias: B has a bias that trains.
        init_lora_weights: `true`: A Kaiming-uniform; `gaussian`: A normal with deviation 1/r; B
            is zero in both. `orthogonal`: A·B is zero. `pissa`, `pissa_niter_4` (a randomised SVD
            with so many iterations) and `olora` begin with a part of the base.
        modules_to_save: Modules that are trained whole and saved with the adapter, by how their
            names end, at a dot or not: `norm` takes `input_layernorm` too, as in PEFT.
        trainable_token_indices: Tokens whose embeddings train: ids of the input embedding, or
            module name to ids.
    """

    r: Annotated[Count, OfStep] = 16
    lora_alpha: Annotated[Alpha, OfStep] = 16.0
    lora_dropout: Annotated[BelowOne, OfStep] = 0.0
    target_modules: Annotated[Modules, OfStep] = "all-linear"
    exclude_modules: Annotated[Modules | None, OfStep] = None
    layers_to_transform: Annotated[Index | tuple[Index, ...] | None, FromList, OfStep] = None
    layers_pattern: Annotated[Modules | None, OfStep] = None
    rank_pattern: Annotated[dict[str, Count], OfStep] = Field(default={})
    alpha_pattern: Annotated[dict[str, Alpha], OfStep] = Field(default={})
    use_rslora: Annotated[bool, OfStep] = False
    use_dora: Annotated[bool, OfStep] = False
    lora_bias: Annotated[bool, OfStep] = False
    bias: Annotated[Literal["none", "all", "lora_only"], OfStep] = "none"
    init_lora_weights: Annotated[Initialisation, OfStep] = True
    eva_config: Annotated[EvaConfig | None, OfStep] = None
    modules_to_save: Annotated[Names | None, OfStep] = None
    trainable_token_indices: Annotated[Tokens | dict[str, Tokens] | None, OfStep] = None

    @property
    def eva(self) -> EvaConfig:
        """The settings of EVA; their defaults if none are given."""
        return self.eva_config or EvaConfig()

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _check_patterns[T](cls, patterns: dict[str, T]) -> dict[str, T]:
        for pattern in patterns:
            check_regex(pattern)
        return patterns

    @override
    def conflicts(self) -> Iterator[Conflict]:
        if isinstance(self.target_modules, str) and self.layers_to_transform not in (None, ()):
            yield (
                "layers_to_transform",
                "needs target_modules as a list of name endings, as in PEFT; with a regular "
                "expression or all-linear, name the layers in exclude_modules",
            )
        if self.layers_to_transform == ():
            yield "layers_to_transform", "needs at least one layer, got an empty list"
        if self.use_dora and self.lora_bias:
            yield "lora_bias", "does not go with use_dora, as in PEFT: set one of them to false"
        if self.eva_config is not None and self.init_lora_weights != EVA:
            yield "eva_config", "is only read with init_lora_weights: eva; set it, or remove this"
        if self.layers_pattern is not None and self.layers_to_transform is None:
            yield "layers_pattern", "is only read together with layers_to_transform: set both"
