"""Where arrays live: one mesh, and one table from parameter paths to partitions."""

import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"

# First match wins. Data parallelism replicates every parameter; a new layout is a new row.
PARAMETER_SPECS: tuple[tuple[str, PartitionSpec], ...] = ((r".*", PartitionSpec()),)

# Batches are (micro-batches, rows, tokens): the rows are spread over the devices.
BATCH_SPEC = PartitionSpec(None, DATA_AXIS)


def make_mesh(data: int = 1) -> Mesh:
    """Returns a mesh with a data axis of `data` devices; -1 takes all.

    Raises:
        ValueError: If there are fewer devices than asked for.
    """
    devices = jax.devices()
    size = len(devices) if data == -1 else data
    if not 1 <= size <= len(devices):
        raise ValueError(
            f"mesh.data asks for {size} devices and JAX sees {len(devices)} "
            f"({devices[0].device_kind}); set it to at most {len(devices)}, or to -1 for all"
        )
    return Mesh(np.array(devices[:size]), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def parameter_spec(path: str) -> PartitionSpec:
    """Returns the partition of the parameter at a dotted path."""
    return next(spec for pattern, spec in PARAMETER_SPECS if re.fullmatch(pattern, path))


def place_parameters[T](tree: T, mesh: Mesh) -> T:
    """Puts every array of `tree` onto the mesh where the table says."""
    return jax.tree.map(jax.device_put, tree, _parameter_shardings(tree, mesh))


def placed_shapes[T](tree: T, mesh: Mesh) -> T:
    """Returns shapes in the place of arrays, with the shardings of `place_parameters`."""
    place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    return jax.tree.map(place, tree, _parameter_shardings(tree, mesh))


def _parameter_shardings[T](tree: T, mesh: Mesh) -> T:
    def sharding(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return NamedSharding(mesh, parameter_spec(name))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def place_batch[T](batch: T, mesh: Mesh) -> T:
    """Puts a host batch of (micro-batches, rows, …) arrays onto the mesh."""
    return jax.device_put(batch, NamedSharding(mesh, BATCH_SPEC))
