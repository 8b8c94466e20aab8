"""The screen of a run: settings, modules, one example and a summary."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError
from rich import box
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from lorax.config.run import RunConfig, dump_config
from lorax.report.lines import print_line
from lorax.system.wording import format_time, plural

LONGEST_EXAMPLE = 6000
"""Characters of an example that are shown; what lies between its two ends is left out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModuleRow:
    """One kind of adapted module.

    Attributes:
        name: Ending of the module's name, such as `self_attn.q_proj`.
        count: Modules of this kind.
        in_features: Width of its input.
        out_features: Width of its output.
        rank: Rank of the adapter.
        scale: Factor of the adapter's output.
        parameters: Trained parameters of all `count` modules together.
    """

    name: str
    count: int
    in_features: int
    out_features: int
    rank: int
    scale: float
    parameters: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSummary:
    """The result of a run; None stands for a value that was not measured.

    Attributes:
        steps: Optimizer steps.
        seconds: Duration of the run.
        tokens_per_s: Mean speed without compilation.
        mfu: Model FLOPs utilisation, as a share.
        memory_gib: Peak memory.
        memory_source: Whose memory: `device` or `process`.
        loss: Held-out loss before and after, in nats per token.
        exact_match: Share of exactly matched answers before and after.
        files: What was written: a name and its path.
        gradient_checkpointing: What was recomputed: what `auto` came to.
        advice: What to try, where little was learned.
    """

    steps: int
    seconds: float
    tokens_per_s: float | None = None
    mfu: float | None = None
    memory_gib: float | None = None
    memory_source: str = "device"
    loss: tuple[float | None, float | None] = (None, None)
    exact_match: tuple[float | None, float | None] = (None, None)
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    gradient_checkpointing: str | None = None
    advice: tuple[str, ...] = ()

    @classmethod
    def read(cls, values: Mapping[str, Any], where: str) -> "RunSummary":
        """Returns the summary that a file holds; what another version added is left out.

        Raises:
            ValueError: If it lacks what every summary has, or holds something of another type.
        """
        remedy = "remove it, and the run is ended again from its last checkpoint"
        if missing := [name for name in ("steps", "seconds") if name not in values]:
            raise ValueError(f"{where} lacks {' and '.join(missing)}: {remedy}")
        try:
            return TypeAdapter(cls).validate_python(dict(values))
        except ValidationError as error:
            wrong = sorted({str(problem["loc"][0]) for problem in error.errors()})
            raise ValueError(f"{where}: {', '.join(wrong)} cannot be read: {remedy}") from None


def print_config(console: Console, config: RunConfig, *, verbose: bool = True) -> None:
    """Prints settings as YAML that can be run again.

    Args:
        console: Where to.
        config: The run's settings.
        verbose: Whether all are printed, or those that differ from their defaults.
    """
    text = dump_config(config, defaults=verbose).rstrip()
    if not verbose:
        text += "\n# The other settings have their defaults: --verbose prints all of them."
    if console.is_terminal:
        console.print(Syntax(text, "yaml", background_color="default", word_wrap=True))
    else:
        print_line(console, text)


def print_modules(
    console: Console, rows: Sequence[ModuleRow], model_parameters: int | None
) -> None:
    """Prints the adapted modules and the share of trained parameters.

    Args:
        console: Where to.
        rows: The kinds of modules.
        model_parameters: Parameters of the model with its adapters, trained and frozen; None
            leaves the share out.
    """
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, show_edge=False, pad_edge=False)
    modules = sum(row.count for row in rows)
    trained = sum(row.parameters for row in rows)
    table.add_column("adapted module", "all", no_wrap=True)
    table.add_column("count", f"{modules:,}", justify="right")
    table.add_column("in → out", justify="right")
    table.add_column("rank", justify="right")
    table.add_column("scale", justify="right")
    table.add_column("parameters", f"{trained:,}", justify="right")
    for row in rows:
        shape = f"{row.in_features:,} → {row.out_features:,}"
        numbers = f"{row.rank}", f"{row.scale:g}", f"{row.parameters:,}"
        table.add_row(Text(row.name), f"{row.count:,}", shape, *numbers)
    console.print(table)
    if model_parameters is not None:
        share = f"{100 * trained / model_parameters:.3f} %"
        print_line(console, f"trained {trained:,} of {model_parameters:,} parameters ({share})")


def print_example(
    console: Console, pieces: Sequence[tuple[str, bool]], *, targets: int, tokens: int
) -> None:
    """Prints one rendered row of the data: what is trained on in green, or in ⟦ ⟧ in a log.

    Args:
        console: Where to.
        pieces: Stretches of text, and whether their tokens are prediction targets.
        targets: How many tokens of the row are.
        tokens: How many tokens the row has.
    """
    shown = Text()
    for text, supervised in _shorten(_join(pieces), LONGEST_EXAMPLE):
        text = _show_controls(text)
        if console.is_terminal:
            shown.append(text, style="green" if supervised else "dim")
        else:
            shown.append(f"⟦{text}⟧" if supervised else text)
    if console.is_terminal:
        legend = Text.assemble(("green", "green"), ": trained on · ", ("dim", "dim"), ": context")
    else:
        legend = Text("⟦ ⟧: trained on · the rest: context")
    console.print(legend.append(f" · {targets:,} of {tokens:,} tokens are targets"))
    console.print(shown, soft_wrap=not console.is_terminal)


def print_summary(console: Console, summary: RunSummary) -> None:
    """Prints what the run came to and where its files are."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    if summary.loss != (None, None):
        table.add_row("held-out loss", *(_format(value, ".4f") for value in summary.loss))
    if summary.exact_match != (None, None):
        table.add_row("exact match", *(_format(value, ".1%") for value in summary.exact_match))
    if table.row_count:
        console.print(table)
    facts = [f"{plural(summary.steps, 'step')} in {format_time(summary.seconds)}"]
    if summary.tokens_per_s is not None:
        facts.append(f"{summary.tokens_per_s:,.0f} tokens/s")
    if summary.mfu is not None:
        facts.append(f"MFU {_format(summary.mfu, '.1%')}")
    if summary.memory_gib is not None:
        facts.append(f"peak memory {summary.memory_gib:.2f} GiB ({summary.memory_source})")
    print_line(console, " · ".join(facts))
    width = max(map(len, summary.files), default=0)
    for name, path in summary.files.items():
        print_line(console, f"{name:<{width}}  {path}")
    for advice in summary.advice:
        print_line(console, advice, "yellow")


def _join(pieces: Sequence[tuple[str, bool]]) -> list[tuple[str, bool]]:
    joined: list[tuple[str, bool]] = []
    for text, supervised in pieces:
        if joined and joined[-1][1] == supervised:
            joined[-1] = (joined[-1][0] + text, supervised)
        else:
            joined.append((text, supervised))
    return joined


def _shorten(pieces: Sequence[tuple[str, bool]], longest: int) -> list[tuple[str, bool]]:
    """Leaves out the middle of a text of more than `longest` characters, and notes it there."""
    excess = sum(len(text) for text, _ in pieces) - longest
    if excess <= 0:
        return list(pieces)
    start = longest // 2
    end = longest // 2 + excess
    note = f"\n[… {excess:,} characters left out …]\n"
    head = []
    tail = []
    position = 0
    for text, supervised in pieces:
        head.append((text[: max(0, start - position)], supervised))
        tail.append((text[max(0, end - position) :], supervised))
        position += len(text)
    return [piece for piece in [*head, (note, False), *tail] if piece[0]]


def _show_controls(text: str) -> str:
    """Makes control characters visible: data must not steer the terminal."""
    return "".join(
        character if character in "\n\t" or character.isprintable() else repr(character)[1:-1]
        for character in text
    )


def _format(value: float | None, specification: str) -> str:
    return "-" if value is None else format(value, specification).replace("%", " %")
