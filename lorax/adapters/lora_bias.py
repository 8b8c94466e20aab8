"""LoRA whose B has a bias, ``x·W + s·((x·A)·B + c)``."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax.adapters.lora import Lora
from lorax.adapters.method import Parameter, Params, Shape, Spec, Start
from lorax_kernels import LoraWeights, Matrix


class LoraBias(Lora):
    """LoRA with a trained bias c, (n,), that starts at zero; PEFT's `lora_bias`.

    A layer with a bias takes ``s·c`` into it when it is merged; one without cannot be merged.
    """

    name = "lora_bias"
    parameters: Mapping[str, Parameter] = {
        **Lora.parameters,
        "lora_bias": Parameter("lora_B.bias", "n"),
    }
    settings: Mapping[str, Any] = {"peft_type": "LORA", "use_dora": False, "lora_bias": True}

    def claims(self, config: Any) -> bool:
        """See `Method`."""
        return config.lora_bias

    def obstacle(self, spec: Spec, kind: str, shape: Shape) -> str | None:
        """See `Method`."""
        if kind == "lookup":
            return "an embedding's update has no bias. Leave it out with lora.exclude_modules"
        return super().obstacle(spec, kind, shape)

    def identity(self, spec: Spec) -> str:
        """See `Method`."""
        return f"bias {super().identity(spec)}"

    def start(self, spec: Spec, w: Matrix, key, kind: str) -> Start:
        """See `Method`."""
        begun = super().start(spec, w, key, kind)
        zeros = jnp.zeros(w.shape[1], jnp.float32)
        return begun._replace(params={**begun.params, "lora_bias": zeros})

    def operands(self, spec: Spec, w: Matrix, values: Params) -> LoraWeights:
        """See `Method`."""
        operands = super().operands(spec, w, values)
        bias = jnp.float32(spec.scale) * values["lora_bias"]
        return LoraWeights(w, operands.a, operands.b, bias, spec.scale)

    def portable(self, spec: Spec, values: Params, rank: int) -> dict[str, np.ndarray]:
        """See `Method`."""
        raise ValueError("lora_bias adds a bias, which no plain LoRA has")


LORA_BIAS = LoraBias()
