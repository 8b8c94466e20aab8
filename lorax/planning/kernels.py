"""The kernel that computes each group of adapted layers in a run, and the reason."""

import dataclasses
from typing import Any, NamedTuple

from lorax.adapters.nnx.adapter import rank_of
from lorax.adapters.nnx.tree import adapted_layers, named_modules
from lorax.adapters.sites import shape_of
from lorax.config.run import RunConfig
from lorax.layers.carrier import Carrier
from lorax.models.decoder import CausalLM
from lorax.models.family import Family
from lorax_kernels import explain_choice, kernel_obstacle


@dataclasses.dataclass(frozen=True)
class KernelChoice:
    """The kernel that computes some layers.

    Attributes:
        layers: Their names within a decoder layer, joined by ``+``.
        kernel: ``pallas`` or ``xla``.
        reason: Why not the other one.
    """

    layers: str
    kernel: str
    reason: str


def kernel_choices(config: RunConfig, model: CausalLM) -> list[KernelChoice]:
    """Returns one choice per distinct group of layers, at the rows of a full micro-batch.

    Args:
        config: The run's settings.
        model: The adapted model, or its shapes.
    """
    m = config.train.per_device_train_batch_size * config.data.max_seq_length
    dropout = max((layer.adapter.dropout for layer in adapted_layers(model).values()), default=0.0)
    choices: dict[KernelChoice, None] = {}
    for names, sizes in _groups(named_modules(model), model.config.family):
        kernel, reason = explain_choice(
            m,
            sizes[0].k,
            [size.n for size in sizes],
            [size.r for size in sizes if size.r],
            config.model.dtype,
            config.model.kernels,
            dropout,
            stored=next((size.stored for size in sizes if size.stored), None),
        )
        choices[KernelChoice(names, kernel, reason)] = None
    return list(choices)


class _Size(NamedTuple):
    k: int
    n: int
    r: int  # 0 for a layer that takes part without an update
    stored: str | None  # why the kernel cannot read how it is stored


def _groups(modules: dict[str, Any], family: Family) -> list[tuple[str, list[_Size]]]:
    """Returns (names, sizes) of every group with an update, the same in all decoder layers once."""
    found: dict[tuple[str, tuple[_Size, ...]], None] = {}
    done: set[str] = set()
    for name, module in modules.items():
        if not _rank(module) or name in done:
            continue
        parent, _, last = name.rpartition(".")
        together = family.together_with(last)

        def path(member, parent=parent):
            return f"{parent}.{member}" if parent else member

        members = [member for member in together if _size(modules.get(path(member))) is not None]
        done.update(map(path, members))
        sizes = tuple(size for member in members if (size := _size(modules[path(member)])))
        kind = parent.rpartition(".")[2]
        names = "+".join(members)
        found[f"{kind}.{names}" if kind else names, sizes] = None
    return [(names, list(sizes)) for names, sizes in found]


def _size(module: Any) -> _Size | None:
    shape = shape_of(module)
    if shape is None:
        return None
    return _Size(*shape, _rank(module), kernel_obstacle(module.kernel.get_value()))


def _rank(module: Any) -> int:
    """Returns the rank of the adapter of a matmul, 0 if it has none: no kernel does a look-up."""
    if not isinstance(module, Carrier) or module.linear_map.kind != "matmul":
        return 0
    return 0 if module.adapter is None else rank_of(module)


def check_kernels(config: RunConfig, model: CausalLM) -> None:
    """Refuses ``model.kernels: pallas`` where the kernel cannot run.

    Raises:
        ValueError: Naming the layers and what stands in the way.
    """
    if config.model.kernels != "pallas":
        return
    problems = [
        f"for {choice.layers} {choice.reason}"
        for choice in kernel_choices(config, model)
        if choice.kernel != "pallas"
    ]
    if problems:
        raise ValueError(f"model.kernels is pallas, but {'; '.join(problems)}; use auto or xla")
