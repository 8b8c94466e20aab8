"""One layer of every kind in Linen and in NNX, for the tests of this folder."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import lorax
from lorax.adapters.dora import DORA
from lorax.adapters.lora_bias import LORA_BIAS


class One(nn.Module):
    """A model of one layer."""

    layer: nn.Module

    def __call__(self, x, *more):
        return self.layer(x, *more)


class Tied(nn.Module):
    """An embedding that is the head too."""

    layer: nn.Module

    def __call__(self, x):
        return self.layer.attend(jnp.sin(self.layer(x)))


class NnxOne(nnx.Module):
    """Likewise in NNX."""

    def __init__(self, layer, tied=False):
        self.layer = layer
        self.tied = tied

    def __call__(self, x):
        y = self.layer(x)
        return self.layer.attend(jnp.sin(y)) if self.tied else y


@dataclasses.dataclass(frozen=True)
class Kind:
    """A layer in both libraries; the input is (2, 4, 6), or ids below 9."""

    linen: Callable[..., Any]
    nnx: Callable[..., Any]
    ids: bool = False
    tied: bool = False

    def model(self, **options):
        layer = self.linen(**options)
        return Tied(layer) if self.tied else One(layer)

    def inputs(self, dtype=jnp.float32):
        if self.ids:
            return jax.random.randint(jax.random.key(1), (2, 5), 0, 9)
        return jax.random.normal(jax.random.key(1), (2, 4, 6), dtype)

    def in_nnx(self, params):
        """Returns the NNX model of the same weights."""
        model = NnxOne(self.nnx(rngs=nnx.Rngs(0)), self.tied)
        for name, value in params["layer"].items():
            getattr(model.layer, name).set_value(value)
        return model


def linen_embed(**options):
    return nn.Embed(9, 6, **options)


def nnx_embed(**options):
    return nnx.Embed(9, 6, **options)


KINDS = {
    "dense": Kind(lambda **o: nn.Dense(5, **o), lambda **o: nnx.Linear(6, 5, **o)),
    "dense_without_bias": Kind(
        lambda **o: nn.Dense(5, use_bias=False, **o),
        lambda **o: nnx.Linear(6, 5, use_bias=False, **o),
    ),
    "heads": Kind(
        lambda **o: nn.DenseGeneral((2, 3), **o), lambda **o: nnx.LinearGeneral(6, (2, 3), **o)
    ),
    "two_axes": Kind(
        lambda **o: nn.DenseGeneral(5, axis=(-1, -2), **o),
        lambda **o: nnx.LinearGeneral((4, 6), 5, axis=(-2, -1), **o),
    ),
    "einsum": Kind(
        lambda **o: nn.Einsum((6, 2, 3), "btd,dnh->btnh", **o),
        lambda **o: nnx.Einsum("btd,dnh->btnh", (6, 2, 3), (2, 3), **o),
    ),
    "einsum_places": Kind(
        lambda **o: nn.Einsum((6, 2, 3), "btd,dnh->bhtn", **o),
        lambda **o: nnx.Einsum("btd,dnh->bhtn", (6, 2, 3), (3, 2), **o),
    ),
    "embed": Kind(linen_embed, nnx_embed, ids=True),
    "tied_embed": Kind(linen_embed, nnx_embed, ids=True, tied=True),
    "conv": Kind(
        lambda **o: nn.Conv(5, (3,), strides=2, **o),
        lambda **o: nnx.Conv(6, 5, (3,), strides=2, **o),
    ),
}


def settings_for(method, **more):
    chosen = {"use_dora": method is DORA, "lora_bias": method is LORA_BIAS}
    return lorax.LoraConfig(
        **{"r": 2, "lora_alpha": 3.0, "target_modules": ["layer"]} | chosen | more
    )


def moved(variables, size=0.3):
    """Returns variables whose adapters have learned something."""
    flat, tree = jax.tree.flatten(variables["lora"])
    keys = jax.random.split(jax.random.key(7), len(flat))
    new = [
        x + size * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(flat, keys, strict=True)
    ]
    return {**variables, "lora": jax.tree.unflatten(tree, new)}
