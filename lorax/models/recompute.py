"""What the backward pass makes again instead of finding it in memory."""

from typing import Any, Literal, get_args

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

type GradientCheckpointing = Literal["none", "selective", "full", "offload"]

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


def checkpointed(function: Any, policy: GradientCheckpointing) -> Any:
    """Returns `function` with what `policy` says about its backward pass."""
    if policy == "none":
        return function
    # With x·A of each layer, which is small, the last product of `function` need not be repeated.
    full = jax.checkpoint_policies.save_only_these_names("lora_h")
    return jax.checkpoint(function, policy=save_products if policy == "selective" else full)


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
