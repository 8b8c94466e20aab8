"""What a format of an export cannot hold, known before the training."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from flax import nnx

from lorax.adapters.lora_bias import LORA_BIAS
from lorax.adapters.method import shapes_of
from lorax.adapters.nnx.adapter import begins_in_base, rank_of, shape_of
from lorax.adapters.nnx.tree import adapted_layers
from lorax.interop.peft import trains_base_weights
from lorax.interop.peft_files import portable_values
from lorax.interop.peft_tied import tied_keys
from lorax.layers.carrier import Carrier


def refuse_formats(model: nnx.Module, formats: Iterable[str]) -> None:
    """Refuses a format that cannot hold what trains.

    Args:
        model: An adapted model, which may be of shapes.
        formats: Of `lorax.interop.export.ExportFormat`.

    Raises:
        ValueError: Naming the setting, the reason and what to do.
    """
    layers = adapted_layers(model)
    for format in formats:
        try:
            match format:
                case "peft":
                    tied_keys(model)
                case "peft-portable":
                    _refuse_portable(model, layers)
                case "merged":
                    _refuse_merged(layers)
                case "rebased":
                    refuse_rebased(model)
        except ValueError as error:
            why = " (a run always exports as peft)" if format == "peft" else ""
            raise ValueError(f"save.export{why}: {error}") from None


def _refuse_portable(model: nnx.Module, layers: dict[str, Carrier]) -> None:
    if trains_base_weights(model):
        raise ValueError(
            "peft-portable holds A and B only, but lora.bias or lora.modules_to_save trains other "
            "weights too; export peft or merged"
        )
    tied_keys(model)
    for layer in {layer.adapter.spec.method: layer for layer in layers.values()}.values():
        spec = layer.adapter.spec
        shapes = shapes_of(spec, shape_of(layer))
        values: Any = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        portable_values(spec, values, rank_of(layer))


def refuse_rebased(model: nnx.Module) -> None:
    """Refuses a model whose adapters began with no part of the base.

    Raises:
        ValueError: With the reason and what to do.
    """
    if not any(begins_in_base(layer) for layer in adapted_layers(model).values()):
        raise ValueError(
            "rebased holds a base without what the adapters began with, and these began with no "
            "part of it: set lora.init_lora_weights to pissa or olora, or export peft, an adapter "
            "for the base as it is"
        )
    tied_keys(model)


def _refuse_merged(layers: dict[str, Carrier]) -> None:
    for name, layer in layers.items():
        if layer.adapter.spec.method is LORA_BIAS and layer.bias is None:
            raise ValueError(
                f"merged cannot hold the lora_bias of {name}, which has no bias of its own: export "
                "peft, set lora.lora_bias to false, or leave such layers out with "
                "lora.exclude_modules"
            )
