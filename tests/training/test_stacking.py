"""Leaves of one shape side by side, and apart again."""

import jax
import jax.numpy as jnp
import numpy as np

from lorax.training.optim.stacking import stack_alike, unstack


def test_large_leaves_stay_alone_and_are_not_copied():
    large = {name: jnp.ones((2048, 1024)) for name in "abc"}
    stacks = stack_alike(large)
    assert sorted(stack.shape for stack in stacks.values()) == 3 * [(1, 2048, 1024)]
    update = jax.jit(lambda t: unstack(jax.tree.map(lambda x: 2 * x, stack_alike(t)), t))
    memory = update.lower(large).compile().memory_analysis()
    assert memory.temp_size_in_bytes < large["a"].nbytes
    jax.tree.map(np.testing.assert_array_equal, update(large), jax.tree.map(lambda x: 2 * x, large))


def test_leaves_come_back_where_they_were():
    tree = {
        "a": jnp.ones((2, 3)),
        "b": [jnp.zeros((3, 2)), 2 * jnp.ones((2, 3))],
        "c": jnp.ones(()),
    }
    stacks = stack_alike(tree)
    assert {shape: stack.shape for shape, stack in stacks.items()} == {
        "2×3": (2, 2, 3),
        "3×2": (1, 3, 2),
        "": (1,),
    }
    jax.tree.map(np.testing.assert_array_equal, unstack(stacks, tree), tree)
    # An order of its own, as jax's of the keys of a dictionary.
    turned = dict(sorted(stacks.items(), reverse=True))
    jax.tree.map(np.testing.assert_array_equal, unstack(turned, tree), tree)
