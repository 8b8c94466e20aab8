"""Layers whose backward passes keep their order, overlapped with copies to and from the host."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

type Hidden = Float[Array, "b t d"]
type RunLayer = Callable[[nnx.Module, Hidden, Any], Hidden]

_HOST = jax.memory.Space.Host
_DEVICE = jax.memory.Space.Device
_SMALL = 0.25
"""Share of the layer's input: smaller arrays stay on the device."""


def run_in_order(
    runs: Sequence[RunLayer],
    layers: Sequence[nnx.Module],
    hidden: Hidden,
    context: Any,
    *,
    offloaded: int,
) -> Hidden:
    """Runs the layers one after another, and returns the output of the last.

    In a program that copies from or to the host, XLA's scheduler makes room for the copies. It
    postpones the gradients of A and B, which are only needed at the end, and so keeps all their
    inputs: 13 GiB at eight billion parameters and 8,192 tokens. Here each layer's gradients are
    computed with the layer.

    Args:
        runs: Each runs one layer. What is offloaded must keep its input: a function under
            `jax.checkpoint`.
        layers: The layers; their `nnx.Param` variables get gradients.
        hidden: Input of the first one.
        context: Further input of all layers; it gets no gradient.
        offloaded: How many of the first layers, never the last one, store nothing large on the
            device: their input and other large arrays leave it while the layer runs, and come back
            while the backward pass of the next layer runs. Weights and small arrays stay.
    """
    split: list[Any] = [nnx.split(layer, nnx.Param, ...) for layer in layers]
    graphs: list[Any] = [parts[0] for parts in split]
    trainable, rest = ([parts[i] for parts in split] for i in (1, 2))

    def apply(index: int, trainable, rest, hidden, context):
        return runs[index](nnx.merge(graphs[index], trainable, rest), hidden, context)

    @jax.custom_vjp
    def stack(trainable, rest, hidden, context):
        for index, parts in enumerate(zip(trainable, rest, strict=True)):
            hidden = apply(index, *parts, hidden, context)
        return hidden

    def forward(trainable, rest, hidden, context):
        pulls = []
        kept = []
        for index, (own, other) in enumerate(zip(trainable, rest, strict=True)):
            following, pull = jax.vjp(
                lambda own, x, index=index, other=other: apply(index, own, other, x, context),
                own,
                hidden,
            )
            if index < offloaded:
                pull, large = _take_out(pull, hidden, (own, other, context))
                # Together, so that the copies end with the layer, and their sources can be freed.
                large, following = jax.lax.optimization_barrier(
                    (jax.device_put(large, _HOST), following)
                )
            else:
                pull = _Pull.whole(pull)
                large = []
            pulls.append(pull)
            kept.append(large)
            hidden = following
        return hidden, (pulls, kept)

    def backward(saved, gradient):
        pulls, (*kept, fetched) = saved
        of_trainable = []
        for pull in reversed(pulls):
            following = kept.pop() if kept else []
            if following:
                # Not before this layer's turn, and there by its end.
                following, gradient = jax.lax.optimization_barrier((following, gradient))
                following = jax.device_put(following, _DEVICE)
            found = pull(fetched)(gradient)
            fetched, (own, gradient) = jax.lax.optimization_barrier((following, found))
            of_trainable.append(own)
        return of_trainable[::-1], None, gradient, None

    stack.defvjp(forward, backward)
    return stack(trainable, rest, hidden, context)


def _take_out(pull: Any, hidden: jax.Array, given: Any) -> tuple["_Pull", list[jax.Array]]:
    """Returns a pullback without its large arrays, and these; it keeps those in `given`."""
    leaves, structure = jax.tree.flatten(pull)
    stays = {id(leaf) for leaf in jax.tree.leaves(given)}
    large: dict[int, jax.Array] = {}
    for leaf in leaves:
        is_large = leaf.size >= _SMALL * hidden.size and id(leaf) not in stays
        if leaf is hidden or is_large:
            large[id(leaf)] = leaf
    if id(hidden) not in large:
        raise ValueError("the layer does not keep its input, so there is nothing to offload")
    order = list(large)
    slots = tuple(order.index(id(leaf)) if id(leaf) in large else None for leaf in leaves)
    remaining = [leaf for leaf in leaves if id(leaf) not in large]
    return _Pull(remaining, slots, structure), list(large.values())


@jax.tree_util.register_pytree_node_class
class _Pull:
    """A pullback of a layer without its large arrays; a call with them restores it."""

    def __init__(self, leaves: Sequence[Any], slots: tuple[int | None, ...], structure: Any):
        self.leaves = leaves
        self.slots = slots
        self.structure = structure

    @classmethod
    def whole(cls, pull: Any) -> "_Pull":
        """Returns a pullback that keeps all of its arrays."""
        leaves, structure = jax.tree.flatten(pull)
        return cls(leaves, (None,) * len(leaves), structure)

    def __call__(self, large: Sequence[jax.Array]) -> Any:
        rest = iter(self.leaves)
        leaves = [next(rest) if slot is None else large[slot] for slot in self.slots]
        return self.structure.unflatten(leaves)

    def tree_flatten(self):
        return self.leaves, (self.slots, self.structure)

    @classmethod
    def tree_unflatten(cls, fixed, leaves):
        return cls(leaves, *fixed)
