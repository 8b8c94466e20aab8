"""Gradient checkpointing: which activations are stored, and which are recomputed."""

import dataclasses
from typing import Any, Literal, get_args

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from lorax.models.stack.tracing import traced_once

type GradientCheckpointing = Literal["none", "selective", "full", "offload"]

REPEATING = ("full", "offload")
"""Policies that have the backward pass make the products of layers again."""


@dataclasses.dataclass(frozen=True)
class Recomputation:
    """What the backward pass of a model recomputes.

    Attributes:
        policy: What each layer keeps.
        kept_layers: How many layers, counted from the last, keep what "selective" would, where the
            policy is one of `REPEATING`. The backward pass begins with the last layer, which
            therefore costs no memory at the peak, unless the rows are very long.
    """

    policy: GradientCheckpointing
    kept_layers: int = 1

    def __str__(self) -> str:
        if self.policy not in REPEATING or self.kept_layers == 1:
            return str(self.policy)
        return f"{self.policy} with {self.kept_layers} layers kept"

    @property
    def as_settings(self) -> str:
        """Returns the settings that ask for it."""
        kept = self.kept_layers if self.policy in REPEATING else "null"
        return f"train.gradient_checkpointing={self.policy} train.kept_layers={kept}"

    @classmethod
    def read(cls, text: str) -> "Recomputation":
        """Returns that of which `text` is the string."""
        policy, _, rest = text.partition(" with ")
        return cls(check_policy(policy), int(rest.split()[0]) if rest else 1)

    @classmethod
    def of(cls, model: Any) -> "Recomputation":
        """Returns what `model` says of itself; of any other model, that it makes nothing again."""
        policy: Any = getattr(model, "gradient_checkpointing", None)
        if policy not in get_args(GradientCheckpointing.__value__):
            return cls("none")
        return cls(policy, getattr(model, "kept_layers", 1))

    def put_on(self, model: Any) -> None:
        """Sets what `of` returns."""
        model.gradient_checkpointing = self.policy
        model.kept_layers = self.kept_layers


def settings_of(text: str) -> str:
    """Returns the settings that ask for the `Recomputation` of which `text` is the string."""
    return Recomputation.read(text).as_settings


# Elementwise work, and what only moves elements: one pass over memory, fused with its neighbours.
_CHEAP = frozenset(
    "abs add broadcast_in_dim concatenate convert_element_type copy cos custom_jvp_call div eq exp"
    " exp2 expand_dims ge gt integer_pow le log logistic lt max min mul ne neg pad pow reshape"
    " rsqrt select_n sign sin slice split sqrt square squeeze stop_gradient sub tanh"
    " transpose".split()
)


def kept(x: Array) -> Array:
    """Marks an elementwise result that "selective" keeps in place of what it is made from."""
    return checkpoint_name(x, "kept")


def save_products(primitive, *_: Any, **__: Any) -> bool:
    """Says whether "selective" keeps what `primitive` returns: a policy for `jax.checkpoint`.

    Products, attention, reductions, kernels and whatever has a name are kept; other elementwise
    results are recomputed from them.
    """
    return primitive.name not in _CHEAP


def save_attention(primitive, *_: Any, **parameters: Any) -> bool:
    """Says whether "offload" keeps what `primitive` returns: cuDNN's attention, and x·A.

    Attention's output is as large as the layer's input, and takes longer to recompute, the longer
    the sequence.
    """
    return "dot_product_attention" in primitive.name or save_lora_h(primitive, *_, **parameters)


# x·A of each layer is small, and with it the last product of a layer need not be repeated.
save_lora_h = jax.checkpoint_policies.save_only_these_names("lora_h")


def checkpointed(run: Any, policy: GradientCheckpointing) -> Any:
    """Returns `run`, a function of a layer, with what `policy` says about its backward pass."""
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
