"""The choice of `lora_linear`'s implementation, at trace time, from shapes and a table."""

import math
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp

from lorax_kernels.device import device_kind, runs_kernels
from lorax_kernels.dispatch import Kernels, axis_sizes, check_kernels_name
from lorax_kernels.lora_linear.weights import LoraWeights
from lorax_kernels.weights import kernel_obstacle

RANK = 16  # that a group without an update is looked up with
MAX_RANK = 256  # of a launch; a group of more is launched in parts
MAX_DROPPED_RANK = 192  # with dropout the update waits in the ring of 3 slots


def choose(
    x, members: Sequence[LoraWeights], rate: float, kernels: Kernels, row_axes: Sequence[str]
) -> Literal["pallas", "xla"]:
    """Returns the implementation for this call.

    Raises:
        ValueError: If ``pallas`` is asked for where the kernel cannot run.
    """
    k = members[0].w.shape[0]
    ns = [member.w.shape[1] for member in members]
    ranks = [member.a.shape[1] for member in members if member.a is not None]
    shards = math.prod(axis_sizes(row_axes).values())
    m = x.size // k // shards if x.size else 0
    stored = next(filter(None, (kernel_obstacle(member.w) for member in members)), None)
    chosen, reason = explain_choice(m, k, ns, ranks, x.dtype, kernels, rate, stored)
    if chosen == "pallas" and shards > 1:
        if x.shape[0] % shards:
            chosen = "xla"
            reason = f"x has {x.shape[0]} rows of rows, which {shards} shards do not divide"
        elif rate and m % 16:
            chosen = "xla"
            reason = f"with dropout a shard needs a multiple of 16 rows, got {m}"
    if kernels == "pallas" and chosen == "xla":
        raise ValueError(f"kernels is pallas, but {reason}; use auto or xla")
    return chosen


def find_obstacle(
    m: int, k: int, ns: Sequence[int], ranks: Sequence[int], dtype, rate: float
) -> str | None:
    """Returns why the kernel cannot run these sizes on this device, or None if it can."""
    if not runs_kernels():
        return f"the kernel needs a Hopper GPU (H100, H200), and this is {device_kind()}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"the kernel takes bfloat16 and float16, got {jnp.dtype(dtype)}"
    if m < 1:
        return "there are no rows"
    for name, size in (("k", k), *(("n", n) for n in ns)):
        if size % 64 or size < 128:
            return f"{name} must be a multiple of 64 and at least 128, got {size}"
    if ranks and max(ranks) > MAX_RANK:
        return f"the rank must be at most {MAX_RANK}, got {max(ranks)}"
    if rate and ranks and max(ranks) > MAX_DROPPED_RANK:
        return f"with dropout the rank must be at most {MAX_DROPPED_RANK}, got {max(ranks)}"
    return None


def explain_choice(
    m: int,
    k: int,
    ns: Sequence[int],
    ranks: Sequence[int],
    dtype,
    kernels: Kernels,
    rate: float = 0.0,
    stored: str | None = None,
) -> tuple[Literal["pallas", "xla"], str]:
    """Returns the implementation for these sizes on one device, and why not the other.

    Args:
        m: Rows.
        k: Input features.
        ns: Output features of every member.
        ranks: Ranks of the updates.
        dtype: Dtype of the operands.
        kernels: The requested implementation.
        rate: Dropout rate.
        stored: Why the kernel cannot read a stored weight, if it cannot; see `Weight`.
    """
    check_kernels_name(kernels)
    if kernels == "xla":
        return "xla", "as asked"
    obstacle = stored or find_obstacle(m, k, ns, ranks, dtype, rate)
    if obstacle is not None:
        return "xla", obstacle
    if kernels == "pallas":
        return "pallas", "as asked"
    from lorax_kernels.tuning import is_faster

    if is_faster(m, k, sum(ns), max(ranks, default=RANK)):
        return "pallas", ""
    return "xla", f"faster when measured near {m} × {k} × {sum(ns)}, or never measured there"


def padded_rank(r: int) -> int:
    """Returns the rank that the kernels compute with: 16, 32, or a multiple of 64."""
    return 16 if r <= 16 else 32 if r <= 32 else -(-r // 64) * 64


def split(members: Sequence[LoraWeights], rate: float = 0.0) -> list[list[int]]:
    """Divides a group into launches whose ranks fit side by side."""
    most = MAX_DROPPED_RANK if rate else MAX_RANK
    parts: list[list[int]] = [[]]
    total = 0
    for index, member in enumerate(members):
        r = 0 if member.a is None else -(-member.a.shape[1] // 64) * 64
        if parts[-1] and total + r > most:
            parts.append([])
            total = 0
        parts[-1].append(index)
        total += r
    return parts
