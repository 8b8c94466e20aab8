"""What a run reads and what it trains, shown before it starts."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich import box
from rich.console import Console
from rich.table import Table

from lorax.adapters.nnx.adapter import cost_of
from lorax.adapters.nnx.tree import adapted_layers
from lorax.config.run import RunConfig
from lorax.data.chat.tokenizer import Tokenizer
from lorax.data.dataset import EncodedDataset, EncodeReport
from lorax.data.preview import render_example
from lorax.layers.attention import cudnn_obstacle, resolve_implementation
from lorax.models.decoder import CausalLM
from lorax.models.stack.recompute import Recomputation
from lorax.planning.kernels import kernel_choices
from lorax.planning.memory import DEVICES, POLICIES, Planner
from lorax.report.screen import ModuleRow, print_example, print_modules
from lorax.system.hardware import GIB, USABLE


def report_data(
    console: Console,
    config: RunConfig,
    datasets: dict[str, EncodedDataset],
    tokenizer: Tokenizer,
    rows: int = 1,
    *,
    context: int,
) -> None:
    """Prints what was read, and a few rendered rows of the first dataset with their loss mask.

    Args:
        console: Where.
        config: The run's settings.
        datasets: By what they are for.
        tokenizer: The model's.
        rows: How many to show.
        context: Tokens that the model was made for.
    """
    for name, data in datasets.items():
        report = data.report
        console.print(
            f"{name}: {_kept(report)}, {report.tokens:,} tokens, "
            f"{report.supervised_tokens:,} supervised · format {report.format} · mask from "
            f"{report.mask_source} · loss on {config.data.loss_on}",
            highlight=False,
            soft_wrap=True,
        )
        for count, what in (
            (report.rows_truncated, "truncated to data.max_seq_length"),
            (report.rows_dropped_overlong, "dropped, longer than data.max_seq_length"),
            (report.rows_dropped_unsupervised, "dropped, without a supervised token"),
        ):
            if count:
                console.print(f"{name}: {count:,} rows {what}", style="yellow", highlight=False)
        for change in report.changes:
            console.print(
                f"{name}: {change.rows:,} rows {change.what}; the first, {change.first}",
                style="yellow",
                highlight=False,
                soft_wrap=True,
            )
        if report.unmet:
            console.print(
                f"{name}: data.ignore names {', '.join(report.unmet)}, which no row holds",
                style="yellow",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        if report.date is not None:
            console.print(
                f"{name}: the chat template is told that today is {report.date} (data.date)",
                highlight=False,
            )
        if (longest := int(data.lengths.max())) > context:
            console.print(
                f"{name}: rows of up to {longest:,} tokens, the model was made for {context:,}: "
                "lower data.max_seq_length, unless it is to learn that",
                style="yellow",
                highlight=False,
                soft_wrap=True,
            )
    first = next(iter(datasets.values()))
    for index in range(min(rows, len(first))):
        pieces = render_example(first, index, tokenizer)
        tokens, supervised = first.row(index)
        print_example(console, pieces, targets=int(supervised.sum()), tokens=len(tokens))


def _kept(report: EncodeReport) -> str:
    if report.rows_kept > report.rows_read:
        return f"{report.rows_kept:,} rows of {report.rows_read:,} that were read"
    return f"{report.rows_kept:,} of {report.rows_read:,} rows"


def report_notes(console: Console, notes: Iterable[str]) -> None:
    """Prints what the user should know of the files that were read."""
    for note in notes:
        console.print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)


def shows_text(console: Console) -> bool:
    """Says whether training text may be shown: to who looks on, not in a log that others read."""
    return console.file.isatty() or console.is_jupyter  # `is_terminal` can be forced


def report_model(console: Console, config: RunConfig, model: CausalLM) -> None:
    """Prints the adapted modules, or how much a full fine-tune trains."""
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model, nnx.Param))]
    total = sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model, nnx.Variable)))
    console.print(f"attention: {_attention(config, model)}", highlight=False)
    if config.train.method == "full":
        console.print(f"full fine-tuning of {sum(sizes):,} parameters in float32", highlight=False)
        return
    report_kernels(console, config, model)
    print_modules(console, module_rows(model), total)
    others = sum(sizes) - sum(row.parameters for row in module_rows(model))
    if others:
        console.print(
            f"also trained: {others:,} parameters (lora.bias, lora.modules_to_save)",
            highlight=False,
        )


def report_kernels(console: Console, config: RunConfig, model: CausalLM) -> None:
    """Prints what computes each group of adapted layers, and why: one line where all agree."""
    choices = kernel_choices(config, model)
    ways = {(choice.kernel, choice.reason) for choice in choices}
    for kernel, reason in sorted(ways):
        layers = [c.layers for c in choices if (c.kernel, c.reason) == (kernel, reason)]
        where = "all adapted layers" if len(ways) == 1 else ", ".join(layers)
        because = f": {reason}" if reason else ""
        console.print(f"kernels: {kernel} for {where}{because}", highlight=False, soft_wrap=True)


def report_plan(console: Console, config: RunConfig, planner: Planner) -> None:
    """Prints the memory and the time of a step for every policy, and what would fit devices."""
    rows = config.train.per_device_train_batch_size
    length = config.data.max_seq_length
    accumulation = config.train.gradient_accumulation_steps
    console.print(
        f"one device, {rows} × {length:,} tokens, {accumulation} micro-batches per step",
        highlight=False,
    )
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
        table.append([str(choice), *(f"{part / GIB:,.2f}" for part in parts), f"{speed:,.0f}"])
    _print_table(console, header, table)
    host = planner.host_bytes("offload", rows, length) / GIB
    console.print(
        "trained: what trains, its optimizer state and gradients; tokens/s: estimated for an "
        f"H200; offload: {host:,.2f} GiB more in the host's memory",
        style="dim",
        highlight=False,
        soft_wrap=True,
    )
    if held := planner.host_embedding / GIB:
        console.print(
            f"the embedding is in the host's memory: {held:,.2f} GiB", style="dim", highlight=False
        )
    if spared := planner.spared_by_host / GIB:
        console.print(
            f"model.offload_embedding: true would take {spared:,.2f} GiB less on the device",
            style="dim",
            highlight=False,
        )
    console.print("what auto takes", highlight=False)
    budgets = {f"{size} GB": size * USABLE for size in DEVICES}
    if gib := config.train.memory_gib:
        budgets[f"train.memory_gib = {gib:g}"] = gib
    table = [[name, *_pick(planner, rows, length, gib)] for name, gib in budgets.items()]
    _print_table(console, ["within", "recompute", "peak GiB", "tokens/s"], table)
    header = ["recompute", *(f"{size} GB" for size in DEVICES)]
    made_for = f"the model was made for {planner.architecture.context:,} tokens"
    for title, fits, given in (
        (f"largest batch of rows of {length:,} tokens", planner.largest_batch, length),
        (f"longest row in a batch of {rows}; {made_for}", planner.longest_sequence, rows),
    ):
        console.print(title, highlight=False)
        table = [
            [policy, *(f"{fits(policy, given, size * USABLE):,}" for size in DEVICES)]
            for policy in POLICIES
        ]
        _print_table(console, header, table)


def _pick(planner: Planner, rows: int, length: int, gib: float) -> tuple[str, str, str]:
    """Returns what auto takes within `gib`, its peak and its speed, as text."""
    choice = planner.fastest(rows, length, gib)
    cell = choice.policy, rows, length, choice.kept_layers
    peak = planner.memory(*cell).peak / GIB
    if peak > gib:
        return "nothing fits", "", ""
    return str(choice), f"{peak:,.2f}", f"{rows * length / planner.seconds(*cell):,.0f}"


def _print_table(console: Console, header: list[str], rows: list[list[str]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, title in enumerate(header):
        table.add_column(title, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _attention(config: RunConfig, model: Any) -> str:
    """Says what runs attention, and why it is not cuDNN on a GPU."""
    dtype = jnp.dtype(config.model.dtype)
    head_dim = model.config.head_dim
    packed = config.data.packing
    runs = resolve_implementation(config.model.attn_impl, dtype, head_dim, packed=packed)
    if runs == "cudnn":
        return "cuDNN"
    if config.model.attn_impl == "xla" or jax.default_backend() != "gpu":
        return "XLA"
    reason = cudnn_obstacle(dtype, head_dim, packed=packed)
    return f"XLA, which writes all scores to memory, because cuDNN cannot run: {reason}"


def module_rows(model: nnx.Module) -> list[ModuleRow]:
    """Groups the adapted layers by the last two parts of their names, shape, rank and scale."""
    groups: dict[tuple, int] = {}
    for name, layer in adapted_layers(model).items():
        kind = ".".join(name.split(".")[-2:])
        spec = layer.adapter.spec
        shape = layer.in_features, layer.out_features
        key = (kind, *shape, spec.r, spec.scale, cost_of(layer).parameters)
        groups[key] = groups.get(key, 0) + 1
    return [
        ModuleRow(
            name=name,
            count=count,
            in_features=inputs,
            out_features=outputs,
            rank=rank,
            scale=scale,
            parameters=count * parameters,
        )
        for (name, inputs, outputs, rank, scale, parameters), count in groups.items()
    ]
