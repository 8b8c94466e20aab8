"""Placing arrays on a mesh by their partitions."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from lorax.devices.host_memory import HostArray, embedding_on_host, trains_embedding
from lorax.devices.specs import BATCH_SPEC, REPLICATED, Parts, parameter_shardings


def batch_placer(
    model: Any, mesh: Mesh
) -> Callable[[Mapping[str, np.ndarray]], dict[str, jax.Array]]:
    """Returns a function that puts batches for a model onto the mesh; see `place_batch`.

    Raises:
        ValueError: If an embedding in the host's memory would train: its rows in a batch go stale.
    """
    embedding = embedding_on_host(model)
    if embedding is not None and trains_embedding(model):
        raise ValueError(
            "the input embedding trains, so it must be on the device: load the model without "
            "offload_embedding (model.offload_embedding: false), or leave it out of what trains"
        )
    return lambda batch: place_batch(batch, mesh, embedding)


def place_parameters[T](tree: T, mesh: Mesh, parts: Parts = REPLICATED) -> T:
    """Puts every array of `tree` but a `HostArray` onto the mesh; arrays in place are not copied.

    Args:
        tree: The parameters.
        mesh: The devices.
        parts: How parameters are divided; see `parts_of`.
    """

    def place(leaf, where):
        return leaf if isinstance(leaf, HostArray) else jax.device_put(leaf, where)

    return jax.tree.map(place, tree, parameter_shardings(tree, mesh, parts))


def placed_shapes[T](tree: T, mesh: Mesh, parts: Parts = REPLICATED) -> T:
    """Returns shapes in the place of arrays, with the shardings of `place_parameters`."""

    def place(leaf, where):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(place, tree, parameter_shardings(tree, mesh, parts))


def place_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh, embedding: HostArray | None = None
) -> dict[str, jax.Array]:
    """Puts a host batch of (micro-batches, rows, …) arrays onto the mesh.

    Args:
        batch: Arrays by name, ``input_ids`` among them.
        mesh: The devices that share the rows.
        embedding: (vocabulary, d), if it is in the host's memory: its rows for the batch are added
            as ``inputs_embeds``, in memory that the device copies them from when it needs them.
    """
    sharding = NamedSharding(mesh, BATCH_SPEC)
    placed = {name: jax.device_put(value, sharding) for name, value in batch.items()}
    if embedding is not None:
        # As integers: numpy indexes rows of a native dtype many times as fast.
        bits = embedding.view(np.ndarray).view(f"u{embedding.dtype.itemsize}")
        rows = np.take(bits, batch["input_ids"], axis=0).view(embedding.dtype)
        placed["inputs_embeds"] = jax.device_put(rows, sharding.with_memory_kind("pinned_host"))
    return placed
