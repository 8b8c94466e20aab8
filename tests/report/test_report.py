import io
import json
import math
import re

import pytest
from matplotlib import colors
from matplotlib.image import imread
from rich.console import Console

from lorax.config.data import DataConfig, DataSource
from lorax.config.model import ModelConfig
from lorax.config.run import RunConfig, SaveConfig, load_config
from lorax.report.curve import _smooth, draw_loss_curve
from lorax.report.log import read_metrics
from lorax.report.screen import (
    ModuleRow,
    RunSummary,
    StepLine,
    print_config,
    print_example,
    print_modules,
    print_summary,
    show_progress,
)

GREEN, DIM, RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"


def log() -> Console:
    return Console(file=io.StringIO(), width=100, force_terminal=False)


def terminal() -> Console:
    return Console(
        file=io.StringIO(),
        width=100,
        force_terminal=True,
        force_interactive=True,
        color_system="standard",
        legacy_windows=False,
        _environ={},
    )


def output(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(name_or_path="[bold]/a/rather/long/path" + "/deeper" * 20),
        data=DataConfig(train=(DataSource(path="rows.jsonl"),)),
        save=SaveConfig(output_dir="out"),
    )


# Settings.


def test_config_in_a_log_can_be_run_again(config, tmp_path):
    console = log()
    print_config(console, config)
    path = tmp_path / "again.yaml"
    path.write_text(output(console))
    assert load_config(path) == config


def test_config_has_colours_on_a_terminal_only(config):
    plain, coloured = log(), terminal()
    print_config(plain, config)
    print_config(coloured, config)
    assert "\x1b" not in output(plain)
    assert "\x1b[" in output(coloured)


# Modules.


def test_modules_are_counted_and_summed():
    rows = [
        ModuleRow(
            name="self_attn.q_proj",
            count=32,
            in_features=4096,
            out_features=1024,
            rank=16,
            scale=2.0,
            parameters=2_621_440,
        ),
        ModuleRow(
            name="mlp.[down]_proj",
            count=31,
            in_features=14336,
            out_features=4096,
            rank=8,
            scale=0.5,
            parameters=4_571_136,
        ),
    ]
    console = log()
    print_modules(console, rows, 8_000_000_000)
    lines = [line.split() for line in output(console).splitlines()]
    q_proj = "self_attn.q_proj 32 4,096 → 1,024 16 2 2,621,440"
    assert q_proj.split() in lines
    assert "mlp.[down]_proj 31 14,336 → 4,096 8 0.5 4,571,136".split() in lines
    assert "all 63 7,192,576".split() in lines
    assert "trained 7,192,576 of 8,000,000,000 parameters (0.090 %)" in output(console)
    assert max(map(len, output(console).splitlines())) <= 100


def test_share_of_an_unknown_model_is_left_out():
    console = log()
    print_modules(console, [], None)
    assert "trained" not in output(console)


# The example.

PIECES = [
    ("<user>", False),
    (" [red]Capital?[/red]\n", False),
    ("Par", True),
    ("is", True),
    ("</s>", True),
]


def test_example_in_a_log_marks_what_is_trained_on():
    console = log()
    print_example(console, PIECES, targets=3, tokens=5)
    assert output(console) == (
        "⟦ ⟧: trained on · the rest: context · 3 of 5 tokens are targets\n"
        "<user> [red]Capital?[/red]\n⟦Paris</s>⟧\n"
    )


def test_example_on_a_terminal_is_green_where_it_is_trained_on():
    console = terminal()
    print_example(console, PIECES, targets=3, tokens=5)
    assert f"{GREEN}Paris</s>{RESET}" in output(console)
    assert f"{DIM}<user> [red]Capital?[/red]{RESET}" in output(console)
    assert "⟦" not in output(console)


@pytest.mark.parametrize("make", [log, terminal])
def test_example_cannot_steer_the_terminal(make):
    console = make()
    print_example(console, [("\x1b]0;title\x07\x9b31m\r\u202e", True)], targets=1, tokens=1)
    assert r"\x1b]0;title\x07\x9b31m\r\u202e" in output(console)


def test_long_example_keeps_both_ends():
    console = log()
    pieces = [("a" * 5000, False), ("b" * 5000, False), ("c" * 10, True)]
    print_example(console, pieces, targets=1, tokens=3)
    text = output(console)
    assert "[… 4,010 characters left out …]" in text
    assert text.count("a") > 3000 and "⟦cccccccccc⟧" in text and len(text) < 6200


# Progress.


def line(step: int, loss: float | None = 1.5) -> StepLine:
    return StepLine(step=step, loss=loss, learning_rate=2e-4, grad_norm=0.25, tokens_per_s=12345.6)


def test_progress_in_a_log_is_one_line_every_few_steps():
    console = log()
    with show_progress(console, 25, every=10) as advance:
        for step in range(1, 26):
            advance(line(step))
    lines = output(console).splitlines()
    assert [text.split()[1] for text in lines] == ["1/25", "11/25", "21/25", "25/25"]
    values = "loss 1.5000  lr 2.00e-04  grad norm 0.25  12,346 tokens/s"
    assert lines[0] == f"step  1/25  {values}"
    assert lines[-1] == f"step 25/25  {values}  0:00:00 left"


def test_progress_in_a_log_estimates_the_time_left_without_compilation(monkeypatch):
    console, clock = log(), iter([100.0, 102.0, 104.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with show_progress(console, 103, first_step=100, every=1) as advance:
        for step in (101, 102, 103):
            advance(line(step))
    assert [text.split("s/s")[-1] for text in output(console).splitlines()] == [
        *("", "  0:00:02 left", "  0:00:00 left")
    ]


def test_unknown_values_are_dashes():
    console = log()
    with show_progress(console, 1) as advance:
        advance(StepLine(step=1, loss=None, learning_rate=None, grad_norm=None, tokens_per_s=None))
    assert output(console) == "step 1/1  loss -  lr -  grad norm -  - tokens/s\n"


def test_progress_on_a_terminal_is_one_bar_within_the_width():
    console = terminal()
    with show_progress(console, 100_000, first_step=99_998) as advance:
        advance(line(99_999))
        advance(line(100_000, loss=math.nan))
    frames = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output(console)).replace("\r", "\n")
    last = [frame for frame in frames.splitlines() if "100000/100000" in frame][-1]
    assert "loss nan  lr 2.00e-04  grad norm 0.25  12,346 tokens/s" in last
    assert last.rstrip().endswith("left") and len(last.rstrip()) <= 100


# The summary.


def test_summary_compares_before_and_after():
    console = log()
    summary = RunSummary(
        steps=1200,
        seconds=3725.4,
        tokens_per_s=12345.6,
        mfu=0.432,
        memory_gib=34.125,
        loss=(2.3451, 1.2345),
        exact_match=(None, 0.645),
        files={"adapter": "out/adapter", "loss curve": "out/[loss].png"},
    )
    print_summary(console, summary)
    lines = [" ".join(text.split()) for text in output(console).splitlines()]
    assert "held-out loss 2.3451 1.2345" in lines
    assert "exact match - 64.5 %" in lines
    assert (
        "1,200 steps in 1:02:05 · 12,346 tokens/s · MFU 43.2 % · peak memory 34.12 GiB (device)"
    ) in lines
    assert "adapter out/adapter" in lines and "loss curve out/[loss].png" in lines


def test_summary_leaves_out_what_was_not_measured():
    console = log()
    print_summary(console, RunSummary(steps=3, seconds=1.0))
    assert output(console) == "3 steps in 0:00:01\n"


# The curve.


def write_metrics(path, records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def count_pixels(png, color: str) -> int:
    pixels = imread(png)[..., :3]
    return int((abs(pixels - colors.to_rgb(color)).max(axis=-1) < 0.02).sum())


def test_curve_shows_losses_rate_and_norm(tmp_path):
    records = [
        {"step": step, "loss": 3 / step, "learning_rate": 1e-3 / step, "grad_norm": 1.0}
        for step in range(1, 200)
    ]
    metrics, png = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    write_metrics(metrics, [*records, {"step": 100, "eval_loss": 0.5}])
    draw_loss_curve(metrics, png)
    for color in ("tab:blue", "tab:orange", "tab:gray", "tab:purple"):
        assert count_pixels(png, color) > 50, color
    assert count_pixels(png, "tab:red") == 0


def test_curve_marks_steps_that_are_not_finite(tmp_path):
    records = [{"step": step, "loss": None if step == 3 else 1.0} for step in range(1, 6)]
    metrics, png = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    write_metrics(metrics, records)
    draw_loss_curve(metrics, png)
    assert count_pixels(png, "tab:red") > 50


@pytest.mark.parametrize("records", [[], [{"step": 1, "loss": None}], [{"step": 1}]])
def test_curve_without_a_loss_is_refused(tmp_path, records):
    write_metrics(tmp_path / "metrics.jsonl", records)
    with pytest.raises(ValueError, match="no step has a loss"):
        draw_loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_curve_takes_the_last_line_of_a_repeated_step(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "lorax.report.curve._draw_losses", lambda axes, *series: seen.extend(series)
    )
    records = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}, {"step": 2, "loss": 2.0}]
    write_metrics(tmp_path / "metrics.jsonl", records)
    draw_loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert seen[:2] == [[1, 2], [3.0, 2.0]]


def test_smoothing_does_not_lag_and_skips_gaps():
    assert _smooth([1.0, 2.0, 3.0, 4.0, 5.0], 3) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert _smooth([1.0, math.nan, 3.0], 3) == [1.0, 2.0, 3.0]
    assert math.isnan(_smooth([math.nan], 1)[0])


@pytest.mark.parametrize("broken", ["{", "[1]", '{"loss": 1}', '{"step": "1"}'])
def test_broken_line_of_metrics_is_named(tmp_path, broken):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + broken + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: "):
        read_metrics(path)


def test_line_that_is_being_written_is_not_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
