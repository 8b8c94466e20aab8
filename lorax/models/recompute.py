"""What the backward pass makes again instead of finding it in memory."""

from typing import Any, Literal, get_args

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

type GradientCheckpointing = Literal["none", "selective", "full", "offload"]

REPEATING = ("full", "offload")
"""Policies that have the backward pass make the products of each layer but the last again."""

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
    results are made again from them.
    """
    return primitive.name not in _CHEAP


def save_attention(primitive, *_: Any, **parameters: Any) -> bool:
    """Says whether "offload" keeps what `primitive` returns: cuDNN's attention, and x·A.

    Attention's output is as large as the layer's input, and takes longer to make again, the longer
    the sequence.
    """
    return "dot_product_attention" in primitive.name or save_lora_h(primitive, *_, **parameters)


# x·A of each layer is small, and with it the last product of a layer need not be repeated.
save_lora_h = jax.checkpoint_policies.save_only_these_names("lora_h")


def checkpointed(function: Any, policy: GradientCheckpointing) -> Any:
    """Returns `function` with what `policy` says about its backward pass."""
    if policy == "none":
        return function
    policies = {"selective": save_products, "full": save_lora_h, "offload": save_attention}
    return jax.checkpoint(function, policy=policies[policy])


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
