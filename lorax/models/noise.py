"""NEFTune: noise on the embeddings of the input, in training."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key


class NoiseKey(nnx.Variable):
    """The key that decides the noise; None until one is set."""


class EmbeddingNoise(nnx.Module):
    """Adds noise to embeddings, ``e + u`` with u uniform in ±alpha / √(t·d); none in evaluation.

    The noise is a pure function of the key, the same on any number of devices. A training step sets
    a fresh key for every micro-batch: see `lorax.make_train_step`.

    Args:
        alpha: Its size, such as 5.

    Attributes:
        alpha: The argument.
        deterministic: Whether there is none; `model.train()` and `model.eval()` set it.
        key: What decides it.

    Source: Jain et al. 2023, "NEFTune", algorithm 1, https://arxiv.org/abs/2310.05914
    """

    def __init__(self, alpha: float):
        self.alpha = alpha
        self.deterministic = False
        self.key = NoiseKey(None)

    def set_key(self, key: Key[Array, ""]) -> None:
        """Sets what decides the noise, in place."""
        self.key = NoiseKey(key)

    def __call__(self, embeddings: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Returns the embeddings with noise, in their dtype; t counts padding too.

        Raises:
            ValueError: In training, if no key was set.
        """
        if self.deterministic:
            return embeddings
        key = self.key.get_value()
        if key is None:
            raise ValueError(
                "neftune_noise_alpha needs a fresh key every step: train with "
                "lorax.make_train_step, or model.eval() to turn the noise off"
            )
        *_, length, width = embeddings.shape
        bound = self.alpha / math.sqrt(length * width)
        # In float32: draws in bfloat16 are so coarse that their mean is not zero.
        noise = jax.random.uniform(key, embeddings.shape, jnp.float32, -bound, bound)
        return (embeddings.astype(jnp.float32) + noise).astype(embeddings.dtype)
