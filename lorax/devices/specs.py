"""Partitions of parameters and batches over a mesh."""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lorax.devices.mesh import DATA_AXIS

type Parts = tuple[tuple[str, PartitionSpec], ...]
"""(pattern of a parameter's dotted path, its partition); the first that matches counts."""

REPLICATED: Parts = ((r".*", PartitionSpec()),)
"""Data parallelism: every device has every parameter whole."""

# Batches are (micro-batches, rows, tokens): the rows are spread over the devices.
BATCH_SPEC = PartitionSpec(None, DATA_AXIS)


def parts_of(model: Any) -> Parts:
    """Returns the partitions of a model's parameters: its family's, else none."""
    return getattr(model, "parts", REPLICATED)


def parameter_sharding(path: str, mesh: Mesh, parts: Parts = REPLICATED) -> NamedSharding:
    """Returns the sharding of the parameter at a dotted path of the model."""
    spec = next(spec for pattern, spec in parts if re.fullmatch(pattern, path))
    return NamedSharding(mesh, spec)


def parameter_shardings[T](tree: T, mesh: Mesh, parts: Parts = REPLICATED) -> T:
    """Returns the shardings of a tree's arrays on a mesh."""

    def sharding(path, _):
        # The array of a variable is its `value`, which is not part of the parameter's name.
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        return parameter_sharding(name, mesh, parts)

    return jax.tree_util.tree_map_with_path(sharding, tree)
