"""The state of a run as named arrays, and back."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lorax.system.files import CheckpointError

_FORMERLY = ((".attached.default.lora_", ".lora_"),)
"""Parts of paths, and their names in checkpoints of older versions."""


def flatten_tree(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a pytree by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def fill_tree[T](like: T, arrays: Mapping[str, np.ndarray], where: str) -> T:
    """Returns a tree of the structure, types and places of `like` with the values of `arrays`.

    Arrays may have the paths of older versions.

    Raises:
        CheckpointError: If names, shapes or dtypes differ.
    """
    wanted = flatten_tree(like)
    renamed = {_former(path): path for path in wanted}
    arrays = {path if path in wanted else renamed.get(path, path): a for path, a in arrays.items()}
    for missing, what in (
        (wanted.keys() - arrays.keys(), "lacks"),
        (arrays.keys() - wanted.keys(), "has"),
    ):
        if missing:
            raise CheckpointError(
                f"{where} {what} {min(missing)}: it is of another model or optimizer"
            )
    values = []
    for path, leaf in wanted.items():
        value = arrays[path]
        if (value.shape, value.dtype) != (leaf.shape, leaf.dtype):
            raise CheckpointError(
                f"{where}: {path} is {value.dtype}{list(value.shape)}, the run needs "
                f"{leaf.dtype}{list(leaf.shape)}"
            )
        values.append(jax.device_put(value, leaf.sharding))
    return jax.tree.unflatten(jax.tree.structure(like), values)


def _former(path: str) -> str:
    for now, before in _FORMERLY:
        path = path.replace(now, before)
    return path
