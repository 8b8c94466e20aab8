"""LoRA: a low-rank update added to the frozen matmul, ``x·W + s·(x·A)·B``."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax.adapters.method import Parameter, Params, Spec, Start
from lorax_kernels import LoraWeights, Matrix


class Lora:
    """LoRA, and rsLoRA, which differs in the scale alone.

    A new adapter changes nothing, because B, (r, n), starts at zero. A, (k, r), is uniform in
    ±1/√k (``init_lora_weights=True``) or normal with deviation 1/r (``"gaussian"``). For an
    embedding A starts at zero, and B is normal with deviation 1, as in PEFT.

    Source: Hu et al. 2021, "LoRA", §4.1, https://arxiv.org/abs/2106.09685
    """

    name = "lora"
    parameters: Mapping[str, Parameter] = {
        "lora_a": Parameter("lora_A.weight", "kr"),
        "lora_b": Parameter("lora_B.weight", "rn"),
    }
    settings: Mapping[str, Any] = {"peft_type": "LORA", "use_dora": False}

    def claims(self, config: Any) -> bool:
        """See `Method`."""
        return True

    def obstacle(self, kind: str, has_bias: bool) -> str | None:
        """See `Method`."""
        return None

    def identity(self, spec: Spec) -> str:
        """See `Method`."""
        return f"{spec.r} {spec.scale!r} {spec.dropout!r}"

    def start(self, spec: Spec, w: Matrix, key, kind: str) -> Start:
        """See `Method`."""
        k, n = w.shape
        a = jnp.zeros((k, spec.r), jnp.float32)
        b = jnp.zeros((spec.r, n), jnp.float32)
        if kind == "lookup":
            b = jax.random.normal(key, b.shape, jnp.float32)
        elif spec.start == "gaussian":
            a = jax.random.normal(key, a.shape, jnp.float32) / spec.r
        else:
            bound = k**-0.5
            a = jax.random.uniform(key, a.shape, jnp.float32, -bound, bound)
        return Start({"lora_a": a, "lora_b": b}, {}, w)

    def operands(self, spec: Spec, w: Matrix, values: Params) -> LoraWeights:
        """See `Method`."""
        return LoraWeights(w, values["lora_a"], values["lora_b"], scale=spec.scale)

    def portable_rank(self, spec: Spec) -> int:
        """See `Method`."""
        return spec.r

    def portable(self, spec: Spec, values: Params, rank: int) -> dict[str, np.ndarray]:
        """Returns A and s·B, with zeros up to the rank."""
        padding = (0, rank - spec.r)
        a = np.asarray(values["lora_a"])
        b = np.asarray(values["lora_b"]) * np.float32(spec.scale)
        return {"lora_a": np.pad(a, ((0, 0), padding)), "lora_b": np.pad(b, (padding, (0, 0)))}


LORA = Lora()
