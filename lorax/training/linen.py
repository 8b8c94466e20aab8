"""The training step of Linen models with adapters."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from lorax.adapters.linen.merge import ADAPTED
from lorax.adapters.linen.model import TRAINED, AdaptedModel
from lorax.devices.specs import REPLICATED
from lorax.objectives.objective import LossFunction
from lorax.system.arguments import check_kind
from lorax.training.arguments import check_functions, refuse_scaled_by_size
from lorax.training.split import Split
from lorax.training.step import TrainState, TrainStep, compile_step, trained_values


@dataclasses.dataclass(frozen=True, eq=False)
class Bound:
    """An adapted model with its variables, as a loss function calls it.

    Attributes:
        adapted: The model.
        variables: Its variables.
        rngs: A key for every stream of random numbers.
    """

    adapted: AdaptedModel
    variables: Mapping[str, Any]
    rngs: Mapping[str, Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns ``adapted.apply(variables, *args, **kwargs)``; the key of the step decides."""
        return self.adapted.apply(self.variables, *args, rngs=self.rngs, **kwargs)


def split_variables(adapted: AdaptedModel, variables: Mapping[str, Any]) -> Split:
    """Returns the parts of an adapted Linen model, of which the collection ``lora`` trains.

    Raises:
        ValueError: If the variables are not those of the model.
    """
    adapted.base_params(variables)  # which refuses others
    frozen = {name: value for name, value in variables.items() if name != TRAINED}

    def rebuild(trainable, frozen, key):
        # Flax takes `params` for every stream that is not given.
        rngs = {"params": key, "lora": jax.random.fold_in(key, 1)}
        return Bound(adapted, {**frozen, TRAINED: trainable}, rngs)

    return Split(variables[TRAINED], frozen, rebuild, REPLICATED)


def make_train_step(
    adapted: AdaptedModel,
    variables: Mapping[str, Any],
    optimizer: optax.GradientTransformation,
    loss_fn: LossFunction,
    *,
    seed: int = 0,
    mesh: Mesh | None = None,
    skip_nonfinite: bool = False,
    full_determinism: bool = False,
) -> tuple[TrainStep, TrainState]:
    """Returns a compiled training step for an adapted Linen model and the state it starts from.

    It is `lorax.make_train_step` for Linen: its micro-batches, its exact accumulation, its masks
    and its metrics are the same. The collection ``lora`` trains; the others stay as they are, so
    batch statistics are not updated.

    Args:
        adapted: From `apply_lora`.
        variables: Its variables.
        optimizer: Any optax transformation, clipping included.
        loss_fn: ``(model, micro_batch) -> (sum of losses, count)``, and a dict of further sums if
            there are any. It calls ``model(x, train=True)`` as it would `model.apply` without the
            variables and rngs: every stream has a key of its own.
        seed: Seed of the dropout masks.
        mesh: Where to put the arrays, each whole on every device; None leaves them where they are.
        skip_nonfinite: Whether steps that follow one without an update are applied.
        full_determinism: Whether the step comes to the same bits every time on NVIDIA GPUs too.

    Raises:
        TypeError: If the model, the variables, the optimizer or the loss is something else.
        ValueError: If the variables are not those of the model, or the optimizer scales its updates
            by the size of a parameter: the B of an adapter is zero, and would stall.
    """
    check_kind("adapted", adapted, AdaptedModel, ADAPTED)
    check_kind("variables", variables, Mapping, "the variables that apply_lora returns")
    order = "make_train_step(adapted, variables, optimizer, loss_fn)"
    check_functions(optimizer, loss_fn, order)
    split = split_variables(adapted, variables)
    refuse_scaled_by_size(optimizer, split.trainable)
    return compile_step(
        split,
        optimizer,
        loss_fn,
        seed=seed,
        mesh=mesh,
        skip_nonfinite=skip_nonfinite,
        full_determinism=full_determinism,
    )


def merge_state(variables: Mapping[str, Any], state: TrainState) -> dict[str, Any]:
    """Returns `variables` with the trained values of `state` (copied, for a step frees its state).

    Raises:
        TypeError: If the two come in another order.
        ValueError: If a later step has consumed the state.
    """
    if not isinstance(variables, Mapping) or not isinstance(state, TrainState):
        found = f"{type(variables).__name__}, {type(state).__name__}"
        raise TypeError(f"merge_state takes variables and a TrainState, got {found}")
    return {**variables, TRAINED: trained_values(state)}
