"""Dispatch of operations: names of kernels, axes of the mesh, operations on single rows."""

import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lorax_kernels.device import has_triton, runs_kernels

type Kernels = Literal["auto", "pallas", "xla"]


def check_kernels_name(kernels: str) -> None:
    """Refuses a name that is none of `Kernels`.

    Raises:
        ValueError: Naming the value.
    """
    if kernels not in ("auto", "pallas", "xla"):
        raise ValueError(f"kernels must be auto, pallas or xla, got {kernels!r}")


def runs_row_kernels(
    rows: int, dtype, kernels: Kernels = "auto", row_axes: Sequence[str] = ()
) -> bool:
    """Says whether operations on single rows, the norm and the loss, run as kernels.

    They do on Hopper GPUs, in bfloat16 and float16, where JAX comes with Pallas's Triton.

    Args:
        rows: The first dimension, which the mesh's `row_axes` must divide.
        dtype: Dtype of the rows.
        kernels: ``xla`` runs none.
        row_axes: Mesh axes that divide the first dimension.

    Raises:
        ValueError: If `kernels` is no such name.
    """
    check_kernels_name(kernels)
    narrow = dtype in (jnp.bfloat16, jnp.float16)
    divided = rows % math.prod(axis_sizes(row_axes).values()) == 0
    return kernels != "xla" and narrow and divided and runs_kernels() and has_triton()


def axis_sizes(row_axes: Sequence[str]) -> dict[str, int]:
    """Returns the sizes of those axes that the current mesh has and that divide something.

    Inside a `jax.shard_map` over an axis the rows are already those of one shard.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return {}
    open_axes = [a for a in row_axes if a in mesh.shape and a not in mesh.manual_axes]
    return {a: mesh.shape[a] for a in open_axes if mesh.shape[a] > 1}


def explicit_rows(x: jax.Array) -> NamedSharding | None:
    """Returns how the rows of `x` are divided over a mesh that has axes of JAX's type Explicit.

    On such axes JAX requires the sharding of every matmul that sums over a divided dimension. An
    operation runs in `jax.sharding.auto_axes` instead, where the compiler divides it.

    Returns:
        The sharding of an output with the rows of `x`, its last dimension whole; None on another
        mesh.
    """
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[: x.ndim - 1], None))
