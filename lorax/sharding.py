"""Where arrays live: one mesh, and one table from parameter paths to partitions."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"
ROW_AXES = (DATA_AXIS,)  # mesh axes that divide the rows of a batch

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


class HostArray(np.ndarray):
    """A parameter that stays in the host's memory: ``array.view(HostArray)``.

    A compiled function that reads it gets a copy of it in each call; one that does not, gets none.
    """


def embedding_on_host(model: Any) -> HostArray | None:
    """Returns the input embedding of a model, if it stays in the host's memory."""
    variable = _embedding(model)
    value = None if variable is None else variable.get_value()
    return value if isinstance(value, HostArray) else None


def _embedding(model: Any) -> nnx.Variable | None:
    embed = getattr(getattr(model, "model", None), "embed_tokens", None)
    return getattr(embed, "embedding", None)


def embedding_obstacle(model: Any) -> str | None:
    """Returns why the input embedding of a `CausalLM` must be on the device, or None."""
    if model.config.tie_word_embeddings:
        return "the model's output head is the same array (tie_word_embeddings)"
    if isinstance(_embedding(model), nnx.Param):
        return "lora.modules_to_save trains the embedding; take it out there to keep this"
    return None


def batch_placer(
    model: Any, mesh: Mesh
) -> Callable[[Mapping[str, np.ndarray]], dict[str, jax.Array]]:
    """Returns what puts batches for a model onto the mesh; see `place_batch`.

    Raises:
        ValueError: If an embedding in the host's memory would train, whose rows go out of date.
    """
    embedding = embedding_on_host(model)
    if embedding is not None and isinstance(_embedding(model), nnx.Param):
        raise ValueError(
            "the input embedding trains, so it must be on the device: load the model without "
            "offload_embedding (model.offload_embedding: false), or leave it out of what trains"
        )
    return lambda batch: place_batch(batch, mesh, embedding)


def place_parameters[T](tree: T, mesh: Mesh) -> T:
    """Puts every array of `tree` but a `HostArray` onto the mesh where the table says."""
    place = lambda leaf, where: leaf if isinstance(leaf, HostArray) else jax.device_put(leaf, where)
    return jax.tree.map(place, tree, _parameter_shardings(tree, mesh))


def placed_shapes[T](tree: T, mesh: Mesh) -> T:
    """Returns shapes in the place of arrays, with the shardings of `place_parameters`."""
    place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    return jax.tree.map(place, tree, _parameter_shardings(tree, mesh))


def _parameter_shardings[T](tree: T, mesh: Mesh) -> T:
    def sharding(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return NamedSharding(mesh, parameter_spec(name))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def place_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh, embedding: HostArray | None = None
) -> dict[str, jax.Array]:
    """Puts a host batch of (micro-batches, rows, …) arrays onto the mesh.

    Args:
        batch: By name, ``input_ids`` among them.
        mesh: Where the rows are divided.
        embedding: (vocabulary, d), if it is in the host's memory: its rows for the batch go along
            as ``inputs_embeds``, into memory that the device copies them from when it needs them.
    """
    sharding = NamedSharding(mesh, BATCH_SPEC)
    placed = {name: jax.device_put(value, sharding) for name, value in batch.items()}
    if embedding is not None:
        # As integers: numpy takes rows of a dtype of its own many times as fast.
        bits = embedding.view(np.ndarray).view(f"u{embedding.dtype.itemsize}")
        rows = np.take(bits, batch["input_ids"], axis=0).view(embedding.dtype)
        placed["inputs_embeds"] = jax.device_put(rows, sharding.with_memory_kind("pinned_host"))
    return placed
