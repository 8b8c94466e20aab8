"""LoRA: a low-rank update added to the frozen matmul, ``x·W + s·(x·A)·B``."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lorax.adapters.initial import EMBEDDING, as_plain, initialisation
from lorax.adapters.method import Parameter, Params, Shape, Spec, Start
from lorax_kernels import LoraWeights, Matrix


class Lora:
    """LoRA, and rsLoRA, which differs in the scale alone.

    A new adapter changes nothing: A·B is zero (see `lorax.adapters.initial`), or what A·B begins
    with is subtracted, ``x·W + s·(x·A)·B - s·(x·A₀)·B₀`` with A₀ and B₀ fixed (`first_a`,
    `first_b`). PEFT subtracts it from W instead, which rounds W. An embedding begins in its own way
    whatever the setting, as in PEFT.

    Source: Hu et al. 2021, "LoRA", §4.1, https://arxiv.org/abs/2106.09685
    """

    name = "lora"
    has_factor = False
    parameters: Mapping[str, Parameter] = {
        "lora_a": Parameter("lora_A.weight", "kr"),
        "lora_b": Parameter("lora_B.weight", "rn"),
    }
    settings: Mapping[str, Any] = {"peft_type": "LORA", "use_dora": False}

    def claims(self, config: Any) -> bool:
        """See `Method`."""
        return True

    def obstacle(self, spec: Spec, kind: str, shape: Shape) -> str | None:
        """See `Method`."""
        return None if kind == "lookup" else initialisation(spec.start).obstacle(shape, spec.r)

    def identity(self, spec: Spec) -> str:
        """See `Method`."""
        first = f" {spec.start}" if changes_base(spec) else ""
        return f"{spec.r} {spec.scale!r} {spec.dropout!r}{first}"

    def start(self, spec: Spec, w: Matrix, key, kind: str) -> Start:
        """See `Method`."""
        begin = EMBEDDING if kind == "lookup" else initialisation(spec.start)
        a, b = begin.factors(key, w, spec.r, spec.scale)
        fixed = {"first_a": a, "first_b": b} if begin.changes_base else {}
        return Start({"lora_a": a, "lora_b": b}, fixed)

    def operands(self, spec: Spec, w: Matrix, values: Params) -> LoraWeights:
        """See `Method`."""
        return LoraWeights(w, *_factors(values), scale=spec.scale)

    def rank(self, spec: Spec, kind: str) -> int:
        """See `Method`."""
        return spec.r if kind == "lookup" or not changes_base(spec) else 2 * spec.r

    def plain(self, spec: Spec, values: Params) -> tuple[Spec, Params]:
        """See `Method`: rank 2r, where something is subtracted."""
        if "first_a" not in values:
            return spec, values
        a, b = _factors(values)
        alpha = spec.scale * (2 * spec.r if not spec.use_rslora else (2 * spec.r) ** 0.5)
        spec = dataclasses.replace(spec, r=2 * spec.r, lora_alpha=alpha, start=True)
        rest = {name: value for name, value in values.items() if not name.startswith("first_")}
        return spec, {**rest, "lora_a": a, "lora_b": b}

    def portable(self, spec: Spec, values: Params, rank: int) -> dict[str, np.ndarray]:
        """Returns A and s·B, with zeros up to the rank."""
        spec, values = self.plain(spec, values)
        missing = rank - spec.r
        a = np.asarray(values["lora_a"])
        b = np.asarray(values["lora_b"]) * np.float32(spec.scale)
        stack = ((0, 0),) * (a.ndim - 2)
        return {
            "lora_a": np.pad(a, (*stack, (0, 0), (0, missing))),
            "lora_b": np.pad(b, (*stack, (0, missing), (0, 0))),
        }


def changes_base(spec: Spec) -> bool:
    """Says whether an adapter begins with a part of W, which is subtracted."""
    return initialisation(spec.start).changes_base


def _factors(values: Params) -> tuple[jax.Array, jax.Array]:
    """Returns A and B of the whole update: with ``A₀`` and ``-B₀``, where they are subtracted."""
    a = values["lora_a"]
    b = values["lora_b"]
    if "first_a" not in values:
        return a, b
    return as_plain(a, b, values["first_a"], values["first_b"])


LORA = Lora()
