"""The table from parameter paths to partitions."""

import re

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lorax.devices.mesh import DATA_AXIS

# First match wins. Data parallelism replicates every parameter; a new layout is a new row.
PARAMETER_SPECS: tuple[tuple[str, PartitionSpec], ...] = ((r".*", PartitionSpec()),)

# Batches are (micro-batches, rows, tokens): the rows are spread over the devices.
BATCH_SPEC = PartitionSpec(None, DATA_AXIS)


def parameter_spec(path: str) -> PartitionSpec:
    """Returns the partition of the parameter at a dotted path of the model."""
    return next(spec for pattern, spec in PARAMETER_SPECS if re.fullmatch(pattern, path))


def parameter_sharding(path: str, mesh: Mesh) -> NamedSharding:
    """Returns the sharding of the parameter at a dotted path of the model."""
    return NamedSharding(mesh, parameter_spec(path))


def parameter_shardings[T](tree: T, mesh: Mesh) -> T:
    """Returns the shardings of a tree's arrays on a mesh, by the table."""

    def sharding(path, _):
        # What a variable holds is its `value`, which is no part of the parameter's name.
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        return parameter_sharding(name, mesh)

    return jax.tree_util.tree_map_with_path(sharding, tree)
