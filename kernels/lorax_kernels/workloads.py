"""The matmuls of real models that the kernels are tuned for and measured on."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Workload:
    """Linear layers that read one input.

    Attributes:
        name: ``model/layer``.
        k: Input features.
        ns: Output features of every member.
        swiglu: Whether the members are gate and up, combined by ``silu(gate)·up``.
    """

    name: str
    k: int
    ns: tuple[int, ...]
    swiglu: bool = False


# name: hidden size, query and key/value sizes, MLP size
SIZES = {
    "llama_1b": (2048, 2048, 512, 8192),
    "llama_8b": (4096, 4096, 1024, 14336),
    "llama_70b": (8192, 8192, 1024, 28672),
    "qwen3_8b": (4096, 4096, 1024, 12288),
}


def model_workloads(model: str) -> list[Workload]:
    """Returns the groups of a model's layer, then their members alone.

    Args:
        model: A key of `SIZES`.
    """
    hidden, q, kv, inner = SIZES[model]
    groups = [
        Workload(f"{model}/qkv", hidden, (q, kv, kv)),
        Workload(f"{model}/o_proj", q, (hidden,)),
        Workload(f"{model}/gate_up", hidden, (inner, inner)),
        Workload(f"{model}/gate_up_swiglu", hidden, (inner, inner), swiglu=True),
        Workload(f"{model}/down_proj", inner, (hidden,)),
    ]
    members = [("q_proj", q), ("k_proj", kv), ("v_proj", kv), ("gate_proj", inner)]
    alone = [Workload(f"{model}/{name}", hidden, (n,)) for name, n in members]
    return [*groups, *alone, Workload(f"{model}/up_proj", hidden, (inner,))]


def draw(seed, shape: tuple[int, ...], deviation: float, dtype=jnp.bfloat16) -> jax.Array:
    """Returns normal numbers."""
    values = jax.random.normal(jax.random.key(seed), shape, jnp.float32) * deviation
    return values.astype(dtype)
