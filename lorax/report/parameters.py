"""The count of a model's trained and frozen parameters."""

import dataclasses
import io
import math
from typing import override

import jax
from flax import nnx
from rich.console import Console

from lorax.layers.carrier import Frozen
from lorax.report.overview import module_rows
from lorax.report.screen import ModuleRow, print_modules
from lorax.system.arguments import check_kind

_WIDTH = 100


@dataclasses.dataclass(frozen=True)
class TrainableParameters:
    """The trained and frozen parameters of a model; printed, a table.

    Attributes:
        modules: The kinds of adapted modules, with the parameters of their adapters.
        others: Further parameters that train: biases, modules that are trained whole.
        total: All parameters of the model, trained and frozen, adapters included.
    """

    modules: tuple[ModuleRow, ...]
    others: int
    total: int

    @property
    def trained(self) -> int:
        """Parameters that train."""
        return sum(row.parameters for row in self.modules) + self.others

    @property
    def share(self) -> float:
        """Parameters that train, as a share of all: 0 to 1."""
        return self.trained / self.total if self.total else 0.0

    @override
    def __str__(self) -> str:
        text = io.StringIO()
        width = _WIDTH + max((len(row.name) for row in self.modules), default=0)
        console = Console(
            file=text, width=width, color_system=None, force_terminal=False, force_jupyter=False
        )
        if self.modules:
            print_modules(console, self.modules, None)
        if self.others:
            text.write(f"other parameters that train: {self.others:,}\n")
        text.write(
            f"trained {self.trained:,} of {self.total:,} parameters ({100 * self.share:.3f} %)"
        )
        return text.getvalue()


def trainable_parameters(model: nnx.Module) -> TrainableParameters:
    """Counts what trains: adapters by kind of module, and every other `nnx.Param`.

    Args:
        model: Any NNX model; its arrays may be shapes, as of `nnx.eval_shape`.
    """
    check_kind("model", model, nnx.Module, "an nnx.Module")
    rows = tuple(module_rows(model))
    trained = _count(nnx.state(model, nnx.Param))
    frozen = _count(nnx.state(model, Frozen))
    others = trained - sum(row.parameters for row in rows)
    return TrainableParameters(rows, others, trained + frozen)


def _count(state: nnx.State) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))
