"""Nested dicts of parameters, as Linen holds them, read and rebuilt."""

from collections.abc import Iterator, Mapping
from typing import Any

from flax.core import meta

type Path = tuple[str, ...]


def get(tree: Mapping[str, Any], path: Path) -> Any:
    """Returns what a tree holds at a path, or None."""
    for part in path:
        if not isinstance(tree, Mapping) or part not in tree:
            return None
        tree = tree[part]
    return tree


def put(tree: Mapping[str, Any], path: Path, value: Any) -> dict[str, Any]:
    """Returns a tree with a value at a path; dicts on the way are made."""
    if not path:
        return value
    first, *rest = path
    inner = put(tree.get(first, {}), tuple(rest), value) if rest else value
    return {**tree, first: inner}


def leaves(tree: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yields every (path, leaf); a leaf that Flax keeps in a box of metadata is its box."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


def value_at(tree: Mapping[str, Any], path: Path) -> Any:
    """Returns the array at a path, out of its box, or None."""
    return meta.unbox(get(tree, path))


def replaced(tree: Mapping[str, Any], path: Path, value: Any) -> dict[str, Any]:
    """Returns a tree with another array at a path, in the box that was there."""
    return put(tree, path, meta.replace_boxed(get(tree, path), value))


def dotted(path: Path) -> str:
    """Returns a module's name."""
    return ".".join(path)
