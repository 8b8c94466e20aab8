"""Ranks that fit their layers."""

import warnings
from collections.abc import Callable, Mapping

from lorax.adapters.method import Shape
from lorax.adapters.targets import Target, TargetError


def check_rank(shape: Shape, target: Target) -> None:
    """Refuses a rank that exceeds a layer's dimensions.

    Raises:
        TargetError: Naming the layer.
    """
    if not 1 <= target.r <= (largest := min(shape)):
        raise TargetError(
            f"{target.name}: rank must be in [1, {largest}] for a {shape.inputs} × "
            f"{shape.outputs} layer, got {target.r}; "
            "lower it with lora.rank_pattern, or leave the layer out"
        )


def without_narrow(
    targets: list[Target], shapes: Mapping[str, Shape], is_repeated: Callable[[str], bool]
) -> list[Target]:
    """Leaves out the head of a classifier: what has fewer outputs than its rank, in no layer.

    Args:
        targets: What ``all-linear`` matches.
        shapes: Of the layers' matrices, by name.
        is_repeated: Says whether a layer is one of several of its kind.
    """
    narrow = [
        target
        for target in targets
        if shapes[target.name].outputs < target.r and not is_repeated(target.name)
    ]
    if not narrow or len(narrow) == len(targets):
        return targets
    names = ", ".join(f"{target.name} (rank {target.r})" for target in narrow)
    warnings.warn(
        f"all-linear leaves out {names}: fewer outputs than the rank, as a classifier's head has. "
        "Train it whole with lora.modules_to_save, or name it in lora.exclude_modules",
        stacklevel=5,
    )
    return [target for target in targets if target not in narrow]
