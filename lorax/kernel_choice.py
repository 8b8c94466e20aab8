"""What computes each group of adapted layers in a run, and why."""

import dataclasses
from typing import Any

from flax import nnx

from lorax.config import RunConfig
from lorax.lora import lora_layers
from lorax_kernels import explain_choice

# Layers of one module that read one input, and so run as one operation.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclasses.dataclass(frozen=True)
class KernelChoice:
    """What computes some layers.

    Attributes:
        layers: Their names within a decoder layer, joined by ``+``.
        kernel: ``pallas`` or ``xla``.
        reason: Why not the other one.
    """

    layers: str
    kernel: str
    reason: str


def kernel_choices(config: RunConfig, model: nnx.Module) -> list[KernelChoice]:
    """Returns one choice per distinct group of layers, at the rows of a full micro-batch.

    Args:
        config: The run's settings.
        model: The adapted model, or its shapes.
    """
    m = config.train.per_device_train_batch_size * config.data.max_seq_length
    choices: dict[KernelChoice, None] = {}
    for names, layers in _groups(lora_layers(model)).items():
        kernel, reason = explain_choice(
            m,
            layers[0].in_features,
            [layer.out_features for layer in layers],
            [layer.r for layer in layers],
            config.model.dtype,
            config.model.kernels,
        )
        choices[KernelChoice(names, kernel, reason)] = None
    return list(choices)


def _groups(layers: dict[str, Any]) -> dict[str, list[Any]]:
    """Maps the joined names of every group, without its layer's number, to the group's layers."""
    groups: dict[tuple, list[Any]] = {}
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        family = next((i for i, names in enumerate(TOGETHER) if last in names), None)
        groups.setdefault((parent, last if family is None else family), []).append((last, layer))
    found: dict[str, list[Any]] = {}
    for (parent, family), members in groups.items():
        if isinstance(family, int):
            members.sort(key=lambda member: TOGETHER[family].index(member[0]))
        kind = parent.rpartition(".")[2]
        joined = "+".join(last for last, _ in members)
        sizes = {(layer.in_features, layer.out_features, layer.r) for _, layer in members}
        key = f"{kind}.{joined}" if kind else joined
        if key in found and len({*sizes, *_sizes(found[key])}) > len(sizes):
            key = f"{parent}.{joined}"
        found.setdefault(key, [layer for _, layer in members])
    return found


def _sizes(layers: list[Any]) -> set[tuple[int, int, int]]:
    return {(layer.in_features, layer.out_features, layer.r) for layer in layers}


def check_kernels(config: RunConfig, model: nnx.Module) -> None:
    """Refuses ``model.kernels: pallas`` where the kernel cannot run.

    Raises:
        ValueError: Naming the layers and what stands in the way.
    """
    if config.model.kernels != "pallas":
        return
    for choice in kernel_choices(config, model):
        if choice.kernel != "pallas":
            raise ValueError(
                f"model.kernels is pallas, but for {choice.layers} {choice.reason}; use auto or xla"
            )
