"""Layers that are alike are traced once, and come to what they come to one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorax.models.stack.tracing import traced_once


class Layer(nnx.Module):
    def __init__(self, seed, dropout=0.0, sows=False, tag: object = "a"):
        self.linear = nnx.Linear(4, 4, rngs=nnx.Rngs(seed))
        self.dropout = nnx.Dropout(dropout, rngs=nnx.Rngs(0)) if dropout else None
        self.sows, self.tag = sows, nnx.static(tag)

    def __call__(self, x):
        y = jnp.tanh(self.linear(x))
        if self.dropout is not None:
            y = self.dropout(y)
        if self.sows:
            self.seen = nnx.Intermediate(y)
        return y


def run_all(layers, x):
    """Returns the output of layers run in turn, and how many times one was traced."""
    times = []

    def run(layer, x):
        times.append(None)
        return layer(x)

    once = traced_once(run)
    for layer in layers:
        x = once(layer, x)
    return x, len(times)


def differentiate(layers, x):
    """Returns the gradient of a sum over the output, and how many times a layer was traced."""
    graph, state = nnx.split(layers)
    counts = []

    @jax.jit
    def gradient(state, x):
        def loss(state, x):
            y, times = run_all(nnx.merge(graph, state), x)
            counts.append(times)
            return jnp.square(y).sum()

        return jax.grad(loss)(state, x)

    return gradient(state, x), counts[0]


def test_gradients_are_those_of_layers_traced_one_by_one():
    layers, x = nnx.List([Layer(seed) for seed in range(4)]), jnp.ones((2, 4))
    found, times = differentiate(layers, x)
    assert times == 1
    graph, state = nnx.split(layers)

    def loss(state):
        y = x
        for layer in nnx.merge(graph, state):
            y = layer(y)
        return jnp.square(y).sum()

    for ours, theirs in zip(
        jax.tree.leaves(found), jax.tree.leaves(jax.grad(loss)(state)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    assert any(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(found))


def test_layers_that_differ_are_traced_apart():
    layers = [Layer(0), Layer(1, tag="b"), Layer(2), Layer(3, tag="b")]
    assert differentiate(nnx.List(layers), jnp.ones((2, 4)))[1] == 2


@pytest.mark.parametrize("tag", [["not hashable"], "hashable"])
def test_a_layer_that_cannot_be_hashed_runs_as_it_is(tag):
    layers, counts = [Layer(seed, tag=tag) for seed in range(3)], []

    @jax.jit
    def run(x):
        y, times = run_all(layers, x)
        counts.append(times)
        return y

    y = run(jnp.ones((2, 4)))
    assert counts == [3 if isinstance(tag, list) else 1]
    expected = jnp.ones((2, 4))
    for layer in layers:
        expected = layer(expected)
    np.testing.assert_allclose(y, expected, rtol=1e-6)


def test_what_layers_sow_is_not_lost():
    layers = nnx.List([Layer(seed, sows=True) for seed in range(2)])
    graph, state = nnx.split(layers)

    @jax.jit
    def run(state, x):
        merged = nnx.merge(graph, state)
        run_all(merged, x)
        return nnx.state(merged, nnx.Intermediate)

    assert len(jax.tree.leaves(run(state, jnp.ones((2, 4))))) == 2


def test_layers_that_share_a_count_of_masks_draw_different_ones():
    shared = Layer(0, dropout=0.5)
    layers = nnx.List([shared, shared])
    graph, state = nnx.split(layers)

    @jax.jit
    def count(state, x):
        merged = nnx.merge(graph, state)
        run_all(merged, x)
        return merged[0].dropout.rngs.count[...]

    assert int(count(state, jnp.ones((2, 4)))) == 2


def test_outside_of_a_program_layers_run_as_they_are():
    layers = [Layer(seed) for seed in range(3)]
    _, times = run_all(layers, jnp.ones((2, 4)))
    assert times == 3
