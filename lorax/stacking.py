"""Leaves of one shape as one array: hundreds of small arrays cost a launch each."""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import PyTree


def stack_alike(tree: PyTree) -> dict[str, jax.Array]:
    """Returns the leaves of each shape stacked along a new first axis, by shape."""
    leaves = jax.tree.leaves(tree)

    def stack(where: list[int]) -> jax.Array:
        stacked = jnp.stack([leaves[i] for i in where])
        # Else XLA keeps each leaf in the layout of the product it comes from, often transposed,
        # and copies what is made of it.
        return with_layout_constraint(stacked, Layout(tuple(range(stacked.ndim))))

    return {shape: stack(where) for shape, where in _alike(tree).items()}


def unstack(stacks: dict[str, jax.Array], like: PyTree) -> PyTree:
    """Undoes `stack_alike` for a tree of the structure and the shapes of `like`."""
    leaves, structure = jax.tree.flatten(like)
    for shape, where in _alike(like).items():
        for index, leaf in zip(where, stacks[shape], strict=True):
            leaves[index] = leaf
    return structure.unflatten(leaves)


def _alike(tree: PyTree) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for index, leaf in enumerate(jax.tree.leaves(tree)):
        found.setdefault("×".join(map(str, leaf.shape)), []).append(index)
    return found
