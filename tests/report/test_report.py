import dataclasses
import io
import json
import math
import re
from pathlib import Path

import pytest
from matplotlib import colors
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

import lorax
from lorax.config.data import DataConfig, DataSource
from lorax.config.model import ModelConfig
from lorax.config.run import RunConfig, SaveConfig, dump_config, load_config
from lorax.config.train import LrSchedulerKwargs, TrainConfig
from lorax.report.curve import _draw_losses, _smooth, draw_loss_curve
from lorax.report.log import read_metrics
from lorax.report.screen import (
    ModuleRow,
    RunSummary,
    print_config,
    print_example,
    print_modules,
    print_summary,
)

LORAX = Path(lorax.__file__).parent
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


def test_a_short_config_is_what_differs_and_can_be_run_again(config, tmp_path):
    console = log()
    model = config.model.model_copy(update={"dtype": "float32"})
    schedule = LrSchedulerKwargs(min_lr_rate=0.1)
    kind = "cosine_with_min_lr"
    train = TrainConfig(lr_scheduler_type=kind, lr_scheduler_kwargs=schedule, max_steps=7)
    config = config.model_copy(update={"model": model, "train": train})
    print_config(console, config, verbose=False)
    *settings, told = output(console).splitlines()
    assert [line.strip() for line in settings] == [
        *("model:", f"name_or_path: '{config.model.name_or_path}'", "dtype: float32"),
        *("data:", "train:", "- path: rows.jsonl"),
        *("train:", "max_steps: 7", f"lr_scheduler_type: {kind}"),
        *("lr_scheduler_kwargs:", "min_lr_rate: 0.1", "save:", "output_dir: out"),
    ]
    assert told.startswith("# ") and "--verbose prints all" in told and len(told) <= 80
    path = tmp_path / "again.yaml"
    path.write_text(output(console))
    assert load_config(path) == config


def test_a_short_config_of_a_full_run_and_of_an_adapter_is_read_back(config, tmp_path):
    path = tmp_path / "again.yaml"
    for overrides in (["train.method=full"], ["model.adapter=adapters"]):
        path.write_text(dump_config(config, defaults=False))
        changed = load_config(path, overrides)
        path.write_text(dump_config(changed, defaults=False))
        assert load_config(path) == changed


def test_config_has_colours_on_a_terminal_only(config):
    plain, coloured = log(), terminal()
    print_config(plain, config)
    print_config(coloured, config)
    assert "\x1b" not in output(plain)
    assert "\x1b[" in output(coloured)


def test_text_of_users_is_printed_by_one_function_that_reads_no_markup():
    found = [
        f"{path.relative_to(LORAX)}: {line.strip()}"
        for path in LORAX.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"console\.print\(\s*f?[\"']|console\.print\($", line)
    ]
    assert not found, "print_line prints brackets as they are: " + "; ".join(found)


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


def test_a_summary_is_read_back_from_its_file_or_refused_by_name():
    written = RunSummary(steps=3, seconds=1.5, loss=(2.0, None), files={"run": "out"})
    values = json.loads(json.dumps(dataclasses.asdict(written)))
    assert RunSummary.read(values | {"of a later version": 1}, "summary.json") == written
    for wrong in ({"seconds": "long"}, {"loss": [1.0]}, {"files": {"run": [1]}}):
        name = next(iter(wrong))
        with pytest.raises(ValueError, match=f"summary.json: {name} cannot be read: remove it"):
            RunSummary.read(values | wrong, "summary.json")
    with pytest.raises(ValueError, match=r"summary.json lacks steps: remove it"):
        RunSummary.read({"seconds": 1.0}, "summary.json")


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


def test_curve_marks_the_best_step_with_its_value(tmp_path):
    axes = Figure().subplots()
    _draw_losses(axes, [1, 2], [3.0, 1.0], [0, 60, 80, 90], [3.0, 1.25, math.nan, 1.5])
    labels = axes.get_legend_handles_labels()[1]
    assert "best step 60, held-out loss 1.2500" in labels
    records = [{"step": step, "loss": 1.0} for step in range(1, 6)]
    metrics, png = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    for more, marked in (([], False), ([{"step": 3, "eval_loss": 0.5}], True)):
        write_metrics(metrics, [*records, *more])
        draw_loss_curve(metrics, png)
        assert (count_pixels(png, "tab:green") > 50) == marked


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
