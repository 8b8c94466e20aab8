"""The day that a chat template writes is part of a run."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from lorax.cli.main import main
from lorax.config.run import load_config
from tests.tiny import shallow_model

pytestmark = pytest.mark.slow

TINY = Path(__file__).parents[2] / "examples" / "tiny"
DATED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}"
    "{% if loop.first %} on {{ strftime_now('%d %b %Y') }}{% endif %}\n"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# 26 hours apart: never the same day.
BEFORE, AFTER = "Etc/GMT+12", "Pacific/Kiritimati"


@pytest.fixture
def zone():
    """Puts the process into a time zone."""
    before = os.environ.get("TZ")

    def enter(name):
        os.environ.pop("TZ", None) if name is None else os.environ.__setitem__("TZ", name)
        time.tzset()
        return time.strftime("%Y-%m-%d")

    yield enter
    enter(before)


@pytest.fixture
def lorax(tmp_path, capsys):
    """Runs a command on a config with a dated template; returns its exit code and its words."""
    rows = (TINY / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[:4]), encoding="utf-8")
    (tmp_path / "dated.jinja").write_text(DATED, encoding="utf-8")
    config = {
        "model": {"name_or_path": str(shallow_model()), "dtype": "float32"},
        "data": {
            "train": str(tmp_path / "rows.jsonl"),
            "eval": str(tmp_path / "rows.jsonl"),
            "chat_template": str(tmp_path / "dated.jinja"),
            "max_seq_length": 128,
        },
        "train": {"max_steps": 2, "gradient_checkpointing": "none"},
        "save": {"output_dir": str(tmp_path / "run"), "save_steps": 1, "save_total_limit": 9},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config), encoding="utf-8")

    def call(command, *overrides):
        code = main([command, str(tmp_path / "run.yaml"), *overrides])
        return code, "".join(capsys.readouterr())

    return call


def test_a_run_goes_on_after_midnight_with_its_own_date(lorax, zone, tmp_path):
    day = zone(BEFORE)
    code, printed = lorax("train")
    assert code == 0, printed
    assert f"today is {day}" in printed
    assert load_config(tmp_path / "run" / "config.yaml").data.date == day
    exact = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    # As a run stands that was stopped behind its first step.
    (tmp_path / "run" / "summary.json").unlink()

    shutil.rmtree(tmp_path / "run" / "adapter")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000000002")
    assert zone(AFTER) != day
    code, printed = lorax("train", "--resume")
    assert code == 0, printed
    assert f"today is {day}" in printed
    again = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert again == exact
    code, printed = lorax("train", "--resume", "data.date=2001-01-01")
    assert code == 2 and "data.date: 2001-01-01" in printed and day in printed


def test_inspect_shows_the_date_and_a_setting_gives_another(lorax, zone):
    day = zone(AFTER)
    code, printed = lorax("inspect")
    assert code == 0 and f"today is {day} (data.date)" in printed
    code, printed = lorax("inspect", "data.date=2001-02-03")
    assert code == 0 and "today is 2001-02-03" in printed


def test_a_date_that_no_template_asks_for_is_refused(lorax):
    code, printed = lorax("validate", "data.date=2001-02-03", "data.chat_template=tokenizer")
    assert code == 2
    assert "data.date: 2001-02-03 has no effect" in printed and "remove it" in printed
