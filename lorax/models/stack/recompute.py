"""Gradient checkpointing: which activations are stored, and which are recomputed."""

import dataclasses
from typing import Any, Literal, get_args

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from lorax.models.stack.tracing import traced_once

type GradientCheckpointing = Literal["none", "selective", "full", "offload"]

REPEATING = ("full", "offload")
"""Policies under which the backward pass recomputes the matmuls of layers."""


@dataclasses.dataclass(frozen=True)
class Recomputation:
    """The recomputation of a model's backward pass.

    Attributes:
        policy: Decides the activations that each layer stores.
        kept_layers: How many layers, counted from the last, store as much as with "selective",
            where the policy is one of `REPEATING`. The backward pass begins with the last layer,
            which therefore costs no memory at the peak, unless the sequences are very long.
    """

    policy: GradientCheckpointing
    kept_layers: int = 1

    def __str__(self) -> str:
        if self.policy not in REPEATING or self.kept_layers == 1:
            return str(self.policy)
        return f"{self.policy} with {self.kept_layers} layers kept"

    @property
    def as_settings(self) -> str:
        """Returns the settings that request it."""
        kept = self.kept_layers if self.policy in REPEATING else "null"
        return f"train.gradient_checkpointing={self.policy} train.kept_layers={kept}"

    @classmethod
    def read(cls, text: str) -> "Recomputation":
        """Returns the recomputation whose string is `text`."""
        policy, _, rest = text.partition(" with ")
        return cls(check_policy(policy), int(rest.split()[0]) if rest else 1)

    @classmethod
    def of(cls, model: Any) -> "Recomputation":
        """Returns the recomputation of a lorax model; "none" for any other model."""
        policy: Any = getattr(model, "gradient_checkpointing", None)
        if policy not in get_args(GradientCheckpointing.__value__):
            return cls("none")
        return cls(policy, getattr(model, "kept_layers", 1))

    def put_on(self, model: Any) -> None:
        """Sets it on a model; see `of`."""
        model.gradient_checkpointing = self.policy
        model.kept_layers = self.kept_layers


def settings_of(text: str) -> str:
    """Returns the settings that request the `Recomputation` whose string is `text`."""
    return Recomputation.read(text).as_settings


# Operations that are elementwise or only move elements: XLA fuses them into one pass over memory.
_CHEAP = frozenset(
    "abs add broadcast_in_dim concatenate convert_element_type copy cos custom_jvp_call div eq exp"
    " exp2 expand_dims ge gt integer_pow le log logistic lt max min mul ne neg pad pow reshape"
    " rsqrt select_n sign sin slice split sqrt square squeeze stop_gradient sub tanh"
    " transpose".split()
)


def kept(x: Array) -> Array:
    """Marks an elementwise result that "selective" stores instead of its inputs."""
    return checkpoint_name(x, "kept")


def save_products(primitive, *_: Any, **__: Any) -> bool:
    """Says whether "selective" stores the output of `primitive`: a policy for `jax.checkpoint`.

    Matmuls, attention, reductions, kernels and named values are stored; other elementwise results
    are recomputed from them.
    """
    return primitive.name not in _CHEAP


def save_attention(primitive, *_: Any, **parameters: Any) -> bool:
    """Says whether "offload" stores the output of `primitive`: cuDNN's attention, and x·A.

    Attention's output is as large as the layer's input. Its recomputation takes longer, the longer
    the sequence.
    """
    return "dot_product_attention" in primitive.name or save_lora_h(primitive, *_, **parameters)


# x·A of each layer is small, and with it the last matmul of a layer need not be recomputed.
save_lora_h = jax.checkpoint_policies.save_only_these_names("lora_h")


def checkpointed(run: Any, policy: GradientCheckpointing) -> Any:
    """Returns `run`, a function of a layer, under the checkpointing policy."""
    if policy != "none":
        policies = {"selective": save_products, "full": save_lora_h, "offload": save_attention}
        run = jax.checkpoint(run, policy=policies[policy])
    return traced_once(run)


def check_kept_layers(count: Any, layers: int) -> int:
    """Returns `count`.

    Raises:
        ValueError: If it is no number of layers that a model of `layers` has.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= layers:
        raise ValueError(f"kept_layers must be 0 to the model's {layers} layers, got {count!r}")
    return count


def check_policy(policy: Any) -> GradientCheckpointing:
    """Returns `policy`.

    Raises:
        ValueError: If there is none of that name.
    """
    if policy not in get_args(GradientCheckpointing.__value__):
        raise ValueError(
            f"gradient_checkpointing must be none, selective, full or offload, got {policy!r}"
        )
    return policy
