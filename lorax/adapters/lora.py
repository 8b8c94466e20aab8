"""LoRA: a low-rank update added to the frozen matmul, ``x·W + s·(x·A)·B``."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lorax.adapters.method import Cost, FileKey, Params, Shape, Spec
from lorax_kernels import LoraWeights, Matrix, dense, lora_linear


class Lora:
    """LoRA, and rsLoRA, which differs in the scale alone.

    A new adapter changes nothing, because B, (r, n), starts at zero. A, (k, r), is uniform in
    ±1/√k (``init_lora_weights=True``) or normal with deviation 1/r (``"gaussian"``).

    Source: Hu et al. 2021, "LoRA", §4.1, https://arxiv.org/abs/2106.09685
    """

    name = "lora"
    keys: Mapping[str, FileKey] = {
        "lora_a": FileKey("lora_A.weight", transposed=True),
        "lora_b": FileKey("lora_B.weight", transposed=True),
    }
    settings: Mapping[str, Any] = {"peft_type": "LORA", "use_dora": False}

    def claims(self, config: Any) -> bool:
        """See `Method`."""
        return True

    def identity(self, spec: Spec) -> str:
        """See `Method`."""
        return f"{spec.r} {spec.scale!r} {spec.dropout!r}"

    def shapes(self, shape: Shape, spec: Spec) -> dict[str, tuple[int, ...]]:
        """See `Method`."""
        return {"lora_a": (shape.inputs, spec.r), "lora_b": (spec.r, shape.outputs)}

    def start(
        self, shape: Shape, spec: Spec, w: Matrix, key
    ) -> tuple[dict[str, jax.Array], Matrix]:
        """See `Method`."""
        shapes = self.shapes(shape, spec)
        if spec.start == "gaussian":
            a = jax.random.normal(key, shapes["lora_a"], jnp.float32) / spec.r
        else:
            bound = shape.inputs**-0.5
            a = jax.random.uniform(key, shapes["lora_a"], jnp.float32, -bound, bound)
        return {"lora_a": a, "lora_b": jnp.zeros(shapes["lora_b"], jnp.float32)}, w

    def operands(self, spec: Spec, w, params: Params) -> LoraWeights:
        """See `Method`."""
        return LoraWeights(w, params["lora_a"], params["lora_b"], scale=spec.scale)

    def apply(self, spec: Spec, w, params: Params, x, dropout_rate: float, dropout_key):
        """See `Method`."""
        return lora_linear(
            x,
            w,
            params["lora_a"],
            params["lora_b"],
            scale=spec.scale,
            dropout_rate=dropout_rate,
            dropout_key=dropout_key,
            kernels="xla",
        )

    def merged(self, spec: Spec, w, params: Params) -> jax.Array:
        """Returns ``W + s·A·B``."""
        return dense(w, jnp.float32) + self._update(spec, params)

    def unmerged(self, spec: Spec, w, params: Params) -> jax.Array:
        """Returns ``W' - s·A·B``."""
        return dense(w, jnp.float32) - self._update(spec, params)

    def _update(self, spec: Spec, params: Params) -> jax.Array:
        product = jnp.dot(params["lora_a"], params["lora_b"], precision="highest")
        return product * jnp.float32(spec.scale)

    def portable(self, spec: Spec, params: Params, rank: int) -> dict[str, np.ndarray]:
        """Returns A and s·B, with zeros up to the rank."""
        padding = (0, rank - spec.r)
        a, b = (np.asarray(params[name]) for name in self.keys)
        return {
            "lora_a": np.pad(a, ((0, 0), padding)),
            "lora_b": np.pad(b * np.float32(spec.scale), (padding, (0, 0))),
        }

    def cost(self, shape: Shape, spec: Spec) -> Cost:
        """See `Method`."""
        width = shape.inputs + shape.outputs
        return Cost(parameters=spec.r * width, kept=spec.r, streamed=width)

    def parts(self, base: PartitionSpec) -> dict[str, PartitionSpec]:
        """Returns A divided along k as W is, and B along n."""
        rows, columns = (*base, None, None)[:2]
        return {"lora_a": PartitionSpec(rows, None), "lora_b": PartitionSpec(None, columns)}


LORA = Lora()
