"""Checks before anything is written."""

from lorax.adapters.nnx.tree import split_trainable
from lorax.interop.export_formats import refuse_formats
from lorax.interop.peft import check_adapter
from lorax.models.decoder import CausalLM
from lorax.planning.kernels import check_kernels
from lorax.runs.model import Blueprint
from lorax.training.optim.groups import scale_by_settings


def check_weights(blueprint: Blueprint) -> None:
    """Checks the weights without reading the base model's data.

    It reads the files' headers of a base model in a folder, and an adapter.

    Raises:
        ValueError: Naming the file and the tensor that cannot be used.
    """
    _ = blueprint.entries
    adapter = blueprint.config.model.adapter
    if adapter:
        check_adapter(blueprint.shapes, adapter)


def check_targets(blueprint: Blueprint) -> CausalLM:
    """Matches the adapter's settings against the model's names, without any weights.

    Returns:
        The model that trains, with shapes instead of weights.

    Raises:
        ValueError: If a setting matches nothing, a rank does not fit, a learning rate is that of
            nothing, an export cannot hold what trains, or the requested kernels cannot run here.
    """
    config = blueprint.config
    adapted = blueprint.shapes
    if config.train.method == "full":
        return adapted
    refuse_formats(adapted, {"peft": None} | dict.fromkeys(config.save.export))
    if (scale := scale_by_settings(config.train)) is not None:
        scale.init(split_trainable(adapted)[1])
    check_kernels(config, adapted)
    return adapted
