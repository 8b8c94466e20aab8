"""What is learned: a loss of a model and a micro-batch, as a sum and a count."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

type Batch = dict[str, Any]
type LossFunction = Callable[[nnx.Module, Batch], tuple[jax.Array, jax.Array]]
