"""The list of objectives."""

from lorax.config.run import RunConfig
from lorax.objectives.objective import LossFunction, Objective
from lorax.objectives.sft import SFT, Supervised

OBJECTIVES: list[Objective] = [SFT]
"""The first that claims a run's settings is taken; `SFT` claims all."""


def objective_of(config: RunConfig) -> Objective:
    """Returns the objective that the settings of a run ask for."""
    return next(objective for objective in OBJECTIVES if objective.claims(config))


def as_objective(given: LossFunction | Objective) -> Objective:
    """Returns an objective, or wraps a loss function on the rows of supervised fine-tuning."""
    if given is SFT.loss_fn:
        return SFT
    return Supervised("", given) if callable(given) else given
