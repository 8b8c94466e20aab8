"""The line of a step on a terminal and in a log, which steps have one, and what is left to do."""

import io
import itertools
import json
import math
import re

import pytest
from rich.console import Console

from lorax.report.lines import print_line
from lorax.report.listener import Recorder
from lorax.report.log import RunLog
from lorax.report.progress import COLUMNS, StepLine, describe_step, show_progress
from lorax.system.clock import Phases
from lorax.system.wording import format_number, format_time

DAY = 86_400.0


def console(width: int | None = None) -> Console:
    """Returns a terminal of a width, or a log."""
    return Console(
        file=io.StringIO(),
        width=width or 80,
        force_terminal=width is not None,
        force_interactive=width is not None,
        color_system="standard" if width else None,
        legacy_windows=False,
        _environ={},
    )


def output(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def line(step: int, due: bool = True, **values) -> StepLine:
    usual = dict(loss=1.5, learning_rate=2e-4, grad_norm=0.25, tokens_per_s=12345.6)
    return StepLine(step=step, due=due, **usual | values)


def frames(console: Console) -> list[str]:
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output(console))
    return [frame.rstrip() for frame in text.replace("\r", "\n").splitlines() if frame.strip()]


# What a line says.


@pytest.mark.parametrize("loss", [0.1234, 12.34567, 123_456.7, math.nan, None])
@pytest.mark.parametrize("norm", [0.25, 1.234e-7, 123_456.7, math.inf, None])
@pytest.mark.parametrize("left", [59.0, 9.9 * 3600, 99 * 3600, 31 * DAY])
def test_a_line_of_large_totals_fits_80_columns(loss, norm, left):
    step = line(99_999, loss=loss, grad_norm=norm, tokens_per_s=1_234_567.8)
    text = describe_step(step, 100_000, left)
    assert len(text) <= COLUMNS == 80
    names = ["step", "99,999/100,000", "loss", "lr", "2.0e-04", "grad", "1.23M", "tok/s", "left"]
    assert [name for name in names if name in text.split()] == names


def test_a_line_says_where_the_run_stands():
    assert describe_step(line(7), 1250, 3725.4) == (
        "step     7/1,250  loss 1.5000  lr 2.0e-04  grad 0.250  12.3k tok/s  1:02:05 left"
    )
    nothing = line(1, loss=None, learning_rate=None, grad_norm=None, tokens_per_s=None)
    assert describe_step(nothing, 1, None) == "step 1/1  loss -  lr -  grad -  - tok/s"


@pytest.mark.parametrize(
    "value, text",
    [
        *((0.25, "0.250"), (0.00123, "0.001"), (3.14e-7, "3e-07"), (999.4, "999")),
        *((999.6, "1.00k"), (12_345.6, "12.3k"), (1.5e7, "15.0M"), (-2e9, "-2.00G")),
        *((0.0123, "0.0123"), (0.0, "0.00"), (None, "-")),
        *((math.nan, "nan"), (math.inf, "inf")),
    ],
)
def test_a_number_takes_at_most_six_characters(value, text):
    assert format_number(value) == text and len(text) <= 6


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0:00:00"), (35_999, "9:59:59"), (36_000, "10h00m"), (4 * DAY + 4 * 3600, "4d04h")],
)
def test_a_duration_takes_at_most_seven_characters(seconds, text):
    assert format_time(seconds) == text


# A terminal.


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_every_step_and_cuts_nothing(width):
    screen, clock = console(width), itertools.count(0.0, 30.0)
    with show_progress(screen, 100_000, reached=99_997, clock=lambda: next(clock)) as advance:
        advance(line(99_998, due=False))
        print_line(screen, "between")
        advance(line(99_999, due=False, loss=12.3456))
    text = describe_step(line(99_999, loss=12.3456), 100_000, 30.0)
    last = [frame for frame in frames(screen) if "99,999/100,000" in frame][-1]
    assert last.endswith(text) and len(last) <= width and "…" not in output(screen)
    assert ("━" in last) == (width == 120)
    assert "step 99,997/100,000" in frames(screen)[0] and "between" in frames(screen)


@pytest.mark.parametrize("width", [80, 120])
def test_a_long_line_is_broken_between_words_on_a_terminal(width):
    screen, path = console(width), "/" + "very-long/" * 13 + "[red]x[/red]"
    text = f"  answered: {'word ' * 30}and {path} [peft]"
    print_line(screen, text)
    found = output(screen).splitlines()
    assert " ".join(" ".join(found).split()) == " ".join(text.split())
    assert path in found and found[0].startswith("  answered")
    assert all(len(each) <= width for each in found if each != path)


# A log.


def test_a_log_has_a_whole_line_of_each_step_that_is_due():
    file = console()
    with show_progress(file, 25, clock=lambda: 0.0) as advance:
        for step in range(1, 26):
            advance(line(step, due=step % 10 == 0))
    assert [text.split()[1] for text in output(file).splitlines()] == ["1/25", "10/25", "20/25"]
    print_line(file, "word " * 60 + "[b]")
    assert output(file).splitlines()[-1] == "word " * 60 + "[b]"


@pytest.mark.parametrize("seconds, steps", [(20.0, [1, 4, 7, 10]), (90.0, list(range(1, 12)))])
def test_a_log_shows_life_once_a_minute_however_few_steps_are_due(seconds, steps):
    file, time = console(), [0.0]
    with show_progress(file, 1000, clock=lambda: time[0]) as advance:
        for step in range(1, 12):
            time[0] += seconds
            advance(line(step, due=step == 1))
    assert [int(text.split()[1].split("/")[0]) for text in output(file).splitlines()] == steps


def test_the_time_left_does_not_count_the_first_step_which_compiles():
    file, time = console(), [100.0]
    with show_progress(file, 103, reached=100, clock=lambda: time[0]) as advance:
        for step in (101, 102, 103):
            advance(line(step))
            time[0] += 2.0
    assert [text.split("tok/s")[-1] for text in output(file).splitlines()] == [
        *("", "  0:00:02 left", "  0:00:00 left")
    ]


def test_logging_steps_decide_the_lines_of_files_and_of_logs(tmp_path):
    file = console()
    recorder = Recorder(file, 4, Phases())
    usual = dict(loss=1.5, learning_rate=1e-4, grad_norm=0.5, tokens_per_s=100.0, total_steps=10)
    with RunLog(tmp_path) as log, show_progress(file, 10, clock=lambda: 0.0) as show:
        recorder.log, recorder.show = log, show
        for step in range(1, 11):
            recorder({"step": step, **usual} | ({"loss": math.nan} if step == 7 else {}))
    steps = [1, 4, 7, 8, 10]  # the first and the last, each fourth, and what is not finite
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(text)["step"] for text in lines] == steps
    shown = re.findall(r"^step +(\d+)/10 ", output(file), re.M)
    assert [int(step) for step in shown] == steps
