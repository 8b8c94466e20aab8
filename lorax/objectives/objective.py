"""The protocol of an objective: rows to batches, and the sums over a batch."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lorax.config.data import DataConfig
from lorax.config.run import RunConfig
from lorax.data.batches import Batches
from lorax.data.dataset import EncodedDataset

type Batch = dict[str, Any]
type LossFunction = Callable[[nnx.Module, Batch], tuple[jax.Array, ...]]
"""Returns (sum of losses, count), and a dict of further sums if there are any."""


class Terms(NamedTuple):
    """Sums over one micro-batch: micro-batches add up exactly, and are divided once.

    Attributes:
        total: Σ loss.
        divisor: The final divisor of the sums, such as supervised tokens or pairs.
        figures: Σ of each figure, which is divided likewise.
    """

    total: Float[Array, ""]
    divisor: Array
    figures: Mapping[str, Array]


class Objective(Protocol):
    """An objective, as the trainer uses it.

    To add one: a file with an object like this, an entry in `lorax.objectives.objectives`.
    """

    @property
    def name(self) -> str:
        """The objective's name; empty for a loss function of the caller's."""
        ...

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of the figures that a step and an evaluation log in addition to the loss."""
        ...

    @property
    def reference(self) -> bool:
        """Whether it needs the base model's outputs: the same weights, no adapter active."""
        ...

    def claims(self, config: RunConfig) -> bool:
        """Says whether the settings of a run ask for this objective."""
        ...

    def encode(
        self, sources: Any, data: DataConfig, tokenizer: Any, *, vocab_size: int
    ) -> EncodedDataset:
        """Reads and encodes rows.

        Raises:
            ValueError: Naming the file, the line or the setting that cannot be used.
        """
        ...

    def batches(
        self, rows: EncodedDataset, config: RunConfig, *, size: int, count: int, shuffle: bool
    ) -> Batches:
        """Returns the batches of some rows.

        Args:
            rows: From `encode`.
            config: The run's settings.
            size: Rows of a micro-batch, on all devices.
            count: Micro-batches of a step.
            shuffle: Whether each epoch has an order of its own.
        """
        ...

    def terms(self, model: Any, batch: Batch) -> Terms:
        """Returns the sums over one micro-batch; it is traced and differentiated."""
        ...


RESERVED = ("applied", "grad_norm", "loss", "tokens")
"""Metrics of every step, for any objective: no figure has these names."""


def checked(loss_fn: Callable[..., Any]) -> Callable[..., Terms]:
    """Checks the contract of a loss function, with an error in words instead of a tracer's.

    Args:
        loss_fn: A function that returns ``(sum of losses, count)`` or ``(sum of losses, count,
            figures)`` with a dict of sums.

    Returns:
        The function with its sums as `Terms`; it raises ValueError where these are something else.
    """

    def check(*arguments: Any) -> Terms:
        found = loss_fn(*arguments)
        if isinstance(found, tuple) and len(found) in (2, 3):
            total, count, figures = (*found, {})[:3]
            if isinstance(figures, Mapping) and _are_scalars((total, count, *figures.values())):
                sums = {str(name): jnp.asarray(value) for name, value in figures.items()}
                if taken := sorted(set(sums) & set(RESERVED)):
                    raise ValueError(
                        f"loss_fn names a figure {taken[0]!r}, which the step reports itself: "
                        "choose another name"
                    )
                return Terms(jnp.asarray(total), jnp.asarray(count), sums)
        raise ValueError(
            "loss_fn must return (sum of losses, count), two scalars, so that micro-batches can be "
            "weighted exactly: `return (nll * mask).sum(), mask.sum()`; a third value may be a "
            f"dict of further sums, each one scalar; got {_describe(found)}"
        )

    return check


def _describe(found: Any) -> str:
    """Returns the kinds and shapes of what a loss function has returned."""
    if isinstance(found, tuple):
        return f"({', '.join(map(_describe, found))})"
    if isinstance(found, Mapping):
        return f"{{{', '.join(f'{name!r}: {_describe(value)}' for name, value in found.items())}}}"
    shape = getattr(found, "shape", None)
    return type(found).__name__ if shape is None else f"{found.dtype}{list(shape)}"


def _are_scalars(values: Any) -> bool:
    return all(value is not None and jnp.shape(value) == () for value in values)
