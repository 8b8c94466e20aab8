"""The scorecard of faults, in its short form; `tests.faults.scorecard` runs it whole."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STORE = ["F1", "F2", "F3", "F4", "F6", "F7", "F8", "F9", "L3"]
INPUTS = ["D1", "S1", "S2", "S3"]
GROUPS = [STORE, ["F5", "R1", "R2", "P1"], ["D2", "N1", "K4"], INPUTS]
"""Cases that one process runs one after another, each in a fork: it imports lorax once."""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("cases", GROUPS, ids="-".join)
def test_nothing_is_lost(cases, tmp_path):
    out = tmp_path / "torture.json"
    command = [sys.executable, "-m", "tests.faults.scorecard"]
    command += ["--short", "--only", *cases, "--out", str(out)]
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # as conftest has it
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = json.loads(out.read_text())
    assert rows.keys() == set(cases)
    for row in rows.values():
        assert row["passed"] == row["total"] > 0
