"""Layer inputs kept in the host's memory from the forward pass to the backward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

type Hidden = Float[Array, "b t d"]
type RunLayer = Callable[[nnx.Module, Hidden, Any], Hidden]

_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def run_offloaded(
    run: RunLayer, layers: Sequence[nnx.Module], hidden: Hidden, context: Any
) -> Hidden:
    """Returns what the last of the layers, run one after another, returns.

    The input of every layer but the last leaves the device while that layer runs, and comes back
    while the backward pass of the next layer runs: the copies need a third of a layer's time at
    8,192 tokens of an 8B model, over PCIe. What else `run` keeps stays where it is.

    Args:
        run: Runs one layer, and keeps its input: a function under `jax.checkpoint`.
        layers: The layers; their `nnx.Param` variables get gradients.
        hidden: Input of the first one.
        context: What all of them read besides; it gets no gradient.
    """
    split: list[Any] = [nnx.split(layer, nnx.Param, ...) for layer in layers]
    graphs: list[Any] = [parts[0] for parts in split]
    trainable, rest = ([parts[i] for parts in split] for i in (1, 2))

    def apply(index: int, trainable, rest, hidden, context):
        return run(nnx.merge(graphs[index], trainable, rest), hidden, context)

    @jax.custom_vjp
    def stack(trainable, rest, hidden, context):
        for index, parts in enumerate(zip(trainable, rest, strict=True)):
            hidden = apply(index, *parts, hidden, context)
        return hidden

    def forward(trainable, rest, hidden, context):
        pulls, inputs = [], []
        for index, (own, other) in enumerate(zip(trainable, rest, strict=True)):
            following, pull = jax.vjp(
                lambda own, x, index=index, other=other: apply(index, own, other, x, context),
                own,
                hidden,
            )
            pulls.append(_without(pull, hidden))
            if index + 1 < len(layers):
                # Together, so that the copy ends with the layer, and its source can be freed.
                stored = jax.device_put(hidden, _HOST)
                stored, following = jax.lax.optimization_barrier((stored, following))
                inputs.append(stored)
            else:
                inputs.append(hidden)
            hidden = following
        return hidden, (pulls, inputs)

    def backward(saved, gradient):
        pulls, inputs = saved
        (*inputs, fetched), of_trainable = inputs, []
        for pull in reversed(pulls):
            following = None
            if inputs:
                # Not before this layer's turn, and there by its end.
                stored, gradient = jax.lax.optimization_barrier((inputs.pop(), gradient))
                following = jax.device_put(stored, _DEVICE)
            found = pull(fetched)(gradient)
            # The scheduler, which makes room for the copies, would put off what is only wanted at
            # the end, the gradients of A and B, and keep whole layers for them.
            fetched, (own, gradient) = jax.lax.optimization_barrier((following, found))
            of_trainable.append(own)
        return of_trainable[::-1], None, gradient, None

    stack.defvjp(forward, backward)
    return stack(trainable, rest, hidden, context)


def _without(pull: Any, hidden: jax.Array) -> Any:
    """Returns a pytree that is called with `hidden` to become `pull`, and does not hold it."""
    leaves, structure = jax.tree.flatten(pull)
    places = tuple(index for index, leaf in enumerate(leaves) if leaf is hidden)
    if not places:
        raise ValueError("the layer does not keep its input, so there is nothing to offload")
    return _Pull([leaf for leaf in leaves if leaf is not hidden], places, structure)


@jax.tree_util.register_pytree_node_class
class _Pull:
    """A pullback of a layer without the layer's input."""

    def __init__(self, leaves: Sequence[Any], places: tuple[int, ...], structure: Any):
        self.leaves, self.places, self.structure = leaves, places, structure

    def __call__(self, hidden: jax.Array) -> Any:
        rest = iter(self.leaves)
        count = len(self.leaves) + len(self.places)
        leaves = [hidden if i in self.places else next(rest) for i in range(count)]
        return self.structure.unflatten(leaves)

    def tree_flatten(self):
        return self.leaves, (self.places, self.structure)

    @classmethod
    def tree_unflatten(cls, fixed, leaves):
        return cls(leaves, *fixed)
