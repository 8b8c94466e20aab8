"""The output of `lorax plan`: memory and time of a step on a GPU, and what fits it."""

import dataclasses
from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from lorax.config.run import RunConfig
from lorax.models.stack.recompute import Recomputation
from lorax.planning.memory import POLICIES, Planner
from lorax.report.lines import print_line
from lorax.system.gpus import GPUS, H200, Gpu
from lorax.system.hardware import GIB, USABLE
from lorax.system.wording import plural

OTHERS = ("b200", "h200", "h100", "a100", "a100-40gb", "l40s", "5090", "4090")
"""The GPUs for which every plan lists what `auto` takes."""


@dataclasses.dataclass(frozen=True)
class Target:
    """The GPU that a plan is for.

    Attributes:
        gpu: What is known of it.
        gib: What a run may plan with there.
        reason: Why this one.
    """

    gpu: Gpu
    gib: float
    reason: str


def report_plan(
    console: Console, config: RunConfig, target: Target, make_planner: Callable[[Gpu], Planner]
) -> None:
    """Prints which GPU it is for, what every policy takes there, what fits, and other GPUs.

    Args:
        console: Where.
        config: The run's settings.
        target: The GPU.
        make_planner: Returns the planner of the run on a GPU.
    """
    train = config.train
    planner = make_planner(target.gpu)
    print_line(console, f"GPU: {target.gpu.title}, {target.gpu.gb} GB, {target.reason}")
    batches = plural(train.gradient_accumulation_steps, "micro-batch", "micro-batches")
    rows, length = _shape(config)
    print_line(console, f"a step on it: {batches} of {rows} × {length:,} tokens")
    _print_policies(console, config, planner)
    print_line(console, f"auto takes {_describe(_pick(config, planner, target.gib))}")
    if gib := train.memory_gib:
        found = _describe(_pick(config, planner, gib))
        print_line(console, f"within train.memory_gib = {gib:g} auto takes {found}")
    _print_largest(console, config, planner, target.gib)
    _print_others(console, config, target, make_planner)


def _print_policies(console: Console, config: RunConfig, planner: Planner) -> None:
    rows, length = _shape(config)
    header = ["recompute", "weights", "trained", "activations", "working", "peak GiB", "tokens/s"]
    table = []
    choices = [Recomputation(policy) for policy in POLICIES]
    asked = config.train.gradient_checkpointing
    kept = config.train.kept_layers
    if asked != "auto" and kept is not None:
        choices.append(Recomputation(asked, kept))
    for choice in dict.fromkeys(choices):
        cell = choice.policy, rows, length, choice.kept_layers
        m = planner.memory(*cell)
        speed = rows * length / planner.seconds(*cell)
        parts = m.weights, m.trained + m.optimizer + m.gradients, m.activations, m.working, m.peak
        table.append([_short(choice), *(f"{part / GIB:,.2f}" for part in parts), f"{speed:,.0f}"])
    _print_table(console, header, table)
    host = planner.host_bytes("offload", rows, length) / GIB
    measured = planner.gpu.name == H200.name
    by = "as measured on an H200" if measured else "from an H200's, by the ratio of data sheets"
    notes = [
        "trained: what trains, its optimizer state and gradients",
        f"tokens/s: an estimate, {by}",
        f"offload: {host:,.2f} GiB more in the host's memory",
    ]
    if held := planner.host_embedding / GIB:
        notes.append(f"the embedding is in the host's memory: {held:,.2f} GiB")
    if spared := planner.spared_by_host / GIB:
        notes.append(
            f"model.offload_embedding: true would take {spared:,.2f} GiB less on the device"
        )
    for note in notes:
        print_line(console, note, "dim")


def _print_largest(console: Console, config: RunConfig, planner: Planner, gib: float) -> None:
    rows, length = _shape(config)
    context = planner.architecture.context
    print_line(
        console, f"the most that fits {gib:.1f} GiB; the model was made for {context:,} tokens"
    )
    header = ["recompute", f"rows of {length:,} tokens", f"tokens in each of {plural(rows, 'row')}"]
    table = [
        [
            policy,
            f"{planner.largest_batch(policy, length, gib):,}",
            f"{planner.longest_sequence(policy, rows, gib):,}",
        ]
        for policy in POLICIES
    ]
    _print_table(console, header, table)


def _print_others(
    console: Console, config: RunConfig, target: Target, make_planner: Callable[[Gpu], Planner]
) -> None:
    print_line(console, "what auto takes on other GPUs (--gpu NAME shows more of one)")
    table = []
    for gpu in GPUS:
        if gpu.name not in OTHERS or gpu == target.gpu:
            continue
        found = _pick(config, make_planner(gpu), gpu.gib * USABLE)
        speed = f"{found.tokens_per_s:,.0f}" if found.fits else ""
        name = _short(found.choice) if found.fits else "nothing fits"
        table.append([gpu.name, f"{gpu.gb}", name, f"{found.peak:,.2f}", speed])
    _print_table(console, ["GPU", "GB", "recompute", "peak GiB", "tokens/s"], table)


@dataclasses.dataclass(frozen=True)
class _Pick:
    """What auto takes within `gib`: the smallest choice, if nothing fits."""

    choice: Recomputation
    gib: float
    peak: float
    tokens_per_s: float

    @property
    def fits(self) -> bool:
        return self.peak <= self.gib


def _pick(config: RunConfig, planner: Planner, gib: float) -> _Pick:
    rows, length = _shape(config)
    choice = planner.fastest(rows, length, gib)
    cell = choice.policy, rows, length, choice.kept_layers
    speed = rows * length / planner.seconds(*cell)
    return _Pick(choice, gib, planner.memory(*cell).peak / GIB, speed)


def _describe(found: _Pick) -> str:
    if not found.fits:
        return (
            f"nothing: {found.choice.policy} takes the least, {found.peak:,.1f} GiB, and there are "
            f"{found.gib:,.1f}"
        )
    memory = f"{found.peak:,.1f} of {found.gib:,.1f} GiB"
    return f"{found.choice}: {memory}, {found.tokens_per_s:,.0f} tokens/s"


def _shape(config: RunConfig) -> tuple[int, int]:
    return config.train.per_device_train_batch_size, config.data.max_seq_length


def _short(choice: Recomputation) -> str:
    """Returns a choice in words that leave room in a table: `offload, 17 kept`."""
    return str(choice).replace(" with ", ", ").replace(" layers kept", " kept")


def _print_table(console: Console, header: list[str], rows: list[list[Any]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, title in enumerate(header):
        table.add_column(title, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
