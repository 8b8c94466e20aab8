"""DoRA: the direction of every column is adapted by LoRA, its length by a trained magnitude."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lorax.adapters.lora import Lora
from lorax.adapters.method import Parameter, Params, Spec, Start
from lorax_kernels import LoraWeights, Matrix, accumulation_dtype, dense


class Dora(Lora):
    """``m / ‖V‖ · (x·V)`` with ``V = W + s·A·B``, and ‖V‖ the length of each column.

    m, (n,), starts as ‖V‖, so that a new adapter changes nothing. As in PEFT, ‖V‖ gets no gradient,
    and an embedding's columns are its features. Dropout takes part in x·A alone; PEFT drops inputs
    of ``(m / ‖V‖ - 1) · x·W`` too.

    V is never computed. Of every column
    ``‖V‖² = ‖W‖² + 2s·Σ (Wᵀ·A)∘Bᵀ + s²·Σ B∘(AᵀA·B)``, in which ‖W‖² is fixed (`squares`).

    Source: Liu et al. 2024, "DoRA", eq. 5 and §4.3, https://arxiv.org/abs/2402.09353
    """

    name = "dora"
    has_factor = True
    parameters: Mapping[str, Parameter] = {
        **Lora.parameters,
        "magnitude": Parameter("lora_magnitude_vector", "n"),
    }
    settings: Mapping[str, Any] = {"peft_type": "LORA", "use_dora": True}

    def claims(self, config: Any) -> bool:
        """See `Method`."""
        return config.use_dora

    def identity(self, spec: Spec) -> str:
        """See `Method`."""
        return f"dora {super().identity(spec)}"

    def start(self, spec: Spec, w: Matrix, key, kind: str) -> Start:
        """See `Method`."""
        begun = super().start(spec, w, key, kind)
        squares = jnp.square(dense(w, jnp.float32)).sum(0)
        operands = super().operands(spec, w, {**begun.params, **begun.fixed})
        magnitude = _lengths(operands, squares)
        return Start({**begun.params, "magnitude": magnitude}, {**begun.fixed, "squares": squares})

    def operands(self, spec: Spec, w: Matrix, values: Params) -> LoraWeights:
        """See `Method`."""
        operands = super().operands(spec, w, values)
        lengths = jax.lax.stop_gradient(_lengths(operands, values["squares"]))
        # 1 + the relative change, because XLA may divide by multiplying with a reciprocal: where
        # nothing has changed the factor is exactly 1. A column of zeros has no length.
        change = (values["magnitude"] - lengths) / jnp.where(lengths == 0, 1, lengths)
        factor = jnp.where(lengths == 0, 1, 1 + change)
        return LoraWeights(w, operands.a, operands.b, scale=spec.scale, factor=factor)

    def portable(self, spec: Spec, values: Params, rank: int):
        """See `Method`."""
        raise ValueError("DoRA scales the columns of W too, which no plain LoRA does")


def _lengths(operands: LoraWeights, squares: jax.Array) -> jax.Array:
    """Returns the length of every column of ``W + s·A·B``, (n,), float32.

    A and B are rounded to W's dtype, as where the layer multiplies by them.
    """
    assert operands.a is not None and operands.b is not None
    w = dense(operands.w)
    wide = accumulation_dtype(w.dtype)
    options: dict[str, Any] = {"precision": "highest", "preferred_element_type": wide}
    a = operands.a.astype(w.dtype)
    b = operands.b.astype(w.dtype)
    cross = jnp.matmul(w.T, a, **options)
    gram = jnp.matmul(a.T, a, **options)
    b = b.astype(wide)
    update = jnp.matmul(gram, b, precision="highest")
    s = operands.scale
    total = squares + 2 * s * (cross.T * b).sum(0) + s * s * (update * b).sum(0)
    return jnp.sqrt(jnp.maximum(total, 0))


DORA = Dora()
