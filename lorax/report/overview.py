"""The data and the model of a run, shown before it starts."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console

from lorax.adapters.method import Spec
from lorax.adapters.nnx.adapter import cost_of
from lorax.adapters.nnx.tree import adapted_layers
from lorax.config.run import RunConfig
from lorax.data.chat.tokenizer import Tokenizer
from lorax.data.dataset import EncodedDataset, EncodeReport
from lorax.data.preview import render_example
from lorax.layers.attention import cudnn_obstacle, resolve_implementation
from lorax.models.decoder import CausalLM
from lorax.planning.kernels import kernel_choices
from lorax.report.lines import print_line
from lorax.report.screen import ModuleRow, print_example, print_modules
from lorax.system.wording import plural
from lorax.training.course import Course
from lorax.training.optim.schedules import warmup_note


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
        for note, style in _describe_data(config, data, context):
            print_line(console, f"{name}: {note}", style)
    first = next(iter(datasets.values()))
    for index in range(min(rows, len(first))):
        pieces = render_example(first, index, tokenizer)
        tokens, supervised = first.row(index)
        print_example(console, pieces, targets=int(supervised.sum()), tokens=len(tokens))


def _describe_data(
    config: RunConfig, data: EncodedDataset, context: int
) -> Iterator[tuple[str, str]]:
    """Yields lines of what was read, each with its style."""
    report = data.report
    yield (
        f"{_kept(report)}, {report.tokens:,} tokens, {report.supervised_tokens:,} supervised · "
        f"format {report.format} · mask from {report.mask_source} · loss on {config.data.loss_on}",
        "",
    )
    for count, what in (
        (report.rows_truncated, "truncated to data.max_seq_length"),
        (report.rows_dropped_overlong, "dropped, longer than data.max_seq_length"),
        (report.rows_dropped_unsupervised, "dropped, without a supervised token"),
    ):
        if count:
            yield f"{plural(count, 'row')} {what}", "yellow"
    for change in report.changes:
        yield f"{plural(change.rows, 'row')} {change.what}; the first, {change.first}", "yellow"
    if report.unmet:
        yield f"data.ignore names {', '.join(report.unmet)}, which no row holds", "yellow"
    if report.date is not None:
        yield f"the chat template is told that today is {report.date} (data.date)", ""
    if (longest := int(data.lengths.max())) > context:
        yield (
            f"rows of up to {longest:,} tokens, the model was made for {context:,}: lower "
            "data.max_seq_length, unless it is to learn that",
            "yellow",
        )


def _kept(report: EncodeReport) -> str:
    read = plural(report.rows_read, "row")
    if report.rows_kept > report.rows_read:
        return f"{plural(report.rows_kept, 'row')} of {read} that were read"
    return f"{report.rows_kept:,} of {read}"


def report_course(console: Console, course: Course) -> None:
    """Prints the steps of a run, and what of its schedule is not as it looks."""
    steps = plural(course.total_steps, "step")
    widths = course.widths()
    print_line(
        console,
        f"batches: {plural(course.batches.steps_per_epoch, 'optimizer step')} per epoch, {steps} "
        f"in all, rows of up to {max(widths):,} tokens",
    )
    if note := warmup_note(course.config.train, course.total_steps):
        print_line(console, f"WARNING: {note}", "yellow")


def report_notes(console: Console, notes: Iterable[str]) -> None:
    """Prints what the user should know of the files that were read."""
    for note in notes:
        print_line(console, note, "yellow")


def shows_text(console: Console) -> bool:
    """Says whether training text may be shown: to who looks on, not in a log that others read."""
    return console.file.isatty() or console.is_jupyter  # `is_terminal` can be forced


def report_model(console: Console, config: RunConfig, model: CausalLM) -> None:
    """Prints the adapted modules, or how much a full fine-tune trains."""
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model, nnx.Param))]
    total = sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model, nnx.Variable)))
    print_line(console, f"attention: {_attention(config, model)}")
    if config.train.method == "full":
        print_line(console, f"full fine-tuning of {sum(sizes):,} parameters in float32")
        return
    report_kernels(console, config, model)
    print_modules(console, module_rows(model), total)
    others = sum(sizes) - sum(row.parameters for row in module_rows(model))
    if others:
        print_line(
            console, f"also trained: {others:,} parameters (lora.bias, lora.modules_to_save)"
        )


def report_kernels(console: Console, config: RunConfig, model: CausalLM) -> None:
    """Prints what computes each group of adapted layers, and why: one line where all agree."""
    choices = kernel_choices(config, model)
    ways = {(choice.kernel, choice.reason) for choice in choices}
    for kernel, reason in sorted(ways):
        layers = [c.layers for c in choices if (c.kernel, c.reason) == (kernel, reason)]
        where = "all adapted layers" if len(ways) == 1 else ", ".join(layers)
        because = f": {reason}" if reason else ""
        print_line(console, f"kernels: {kernel} for {where}{because}")


def _attention(config: RunConfig, model: Any) -> str:
    """Returns what runs attention, and why it is not cuDNN on a GPU."""
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
    layers = adapted_layers(model)
    return grouped_rows(
        (name, layer.linear_map.shape, layer.adapter.spec, cost_of(layer).parameters)
        for name, layer in layers.items()
    )


def grouped_rows(layers: Iterable[tuple[str, tuple[int, int], Spec, int]]) -> list[ModuleRow]:
    """Groups adapted layers; see `module_rows`.

    Args:
        layers: Name, shape of the matrix, adapter and trained parameters of each.
    """
    groups: dict[tuple, int] = {}
    for name, shape, spec, parameters in layers:
        kind = ".".join(name.split(".")[-2:])
        key = (kind, *shape, spec.r, spec.scale, parameters)
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
