"""Leaves of one shape as one array: hundreds of small arrays cost a launch each."""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import PyTree

_SMALL = 2**20
"""Elements. A larger leaf is worth a launch, and its copy in a stack would cost memory."""


def stack_alike(tree: PyTree) -> dict[str, jax.Array]:
    """Returns the small leaves of each shape stacked along a new first axis, large ones alone."""
    leaves = jax.tree.leaves(tree)

    def stack(where: list[int]) -> jax.Array:
        if leaves[where[0]].size > _SMALL:
            return leaves[where[0]][None]
        stacked = jnp.stack([leaves[i] for i in where])
        # Otherwise XLA keeps each leaf in the layout of the matmul it comes from, often transposed,
        # and copies the results.
        return with_layout_constraint(stacked, Layout(tuple(range(stacked.ndim))))

    return {name: stack(where) for name, where in _alike(tree).items()}


def unstack(stacks: dict[str, jax.Array], like: PyTree) -> PyTree:
    """Undoes `stack_alike` for a tree of the structure and the shapes of `like`."""
    leaves, structure = jax.tree.flatten(like)
    for name, where in _alike(like).items():
        for index, leaf in zip(where, stacks[name], strict=True):
            leaves[index] = leaf
    return structure.unflatten(leaves)


def _alike(tree: PyTree) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for index, leaf in enumerate(jax.tree.leaves(tree)):
        shape = "×".join(map(str, leaf.shape))
        name = shape if leaf.size <= _SMALL else f"{shape} at {index}"
        found.setdefault(name, []).append(index)
    return found
