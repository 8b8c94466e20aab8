"""The count of an adapted Linen model's trained and frozen parameters."""

import math
from collections.abc import Mapping
from typing import Any

import jax
from flax.core import meta

from lorax.adapters.linen.merge import ADAPTED
from lorax.adapters.linen.model import FIXED, AdaptedModel
from lorax.report.overview import grouped_rows
from lorax.report.parameters import TrainableParameters
from lorax.system.arguments import check_kind


def trainable_parameters(
    adapted: AdaptedModel, variables: Mapping[str, Any]
) -> TrainableParameters:
    """Counts what trains: adapters by kind of module, and every other parameter in ``lora``.

    Args:
        adapted: From `apply_lora`.
        variables: Its variables; their arrays may be shapes, as of `jax.eval_shape`.

    Raises:
        TypeError: If one of them is something else.
        ValueError: If the variables are not those of the model.
    """
    check_kind("adapted", adapted, AdaptedModel, ADAPTED)
    check_kind("variables", variables, Mapping, "the variables that apply_lora returns")
    base = _count(adapted.base_params(variables))  # what trains of it is in its place, once
    rows = grouped_rows(
        (layer.name, layer.linear_map.shape, layer.spec, _count(layer.params(variables)))
        for layer in adapted.layers
    )
    others = sum(_count(value) for _, value in adapted.trained_base(variables))
    adapters = sum(row.parameters for row in rows) + _count(variables.get(FIXED, {}))
    return TrainableParameters(tuple(rows), others, base + adapters)


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(meta.unbox(tree)))
