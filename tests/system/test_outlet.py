"""Output whose reader is gone drops what it is given, and nothing else."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorax.cli import main
from lorax.system.streams import Outlet

ROOT = Path(__file__).parents[2]


def test_text_goes_through_while_somebody_reads():
    stream = io.StringIO()
    outlet = Outlet(stream)
    assert outlet.write("ab") == 2
    print("c", file=outlet, flush=True)
    assert stream.getvalue() == "abc\n"
    assert outlet.isatty() is False


def test_what_nobody_reads_is_dropped_and_the_process_ends_as_it_would():
    code = """
import os, sys
from lorax.system.streams import Outlet
sys.stdout, sys.stderr = Outlet(sys.stdout), Outlet(sys.stderr)
sys.stdin.read()
for _ in range(3):
    print("x" * 100_000, flush=True)
    print("y" * 100_000, file=sys.stderr)
    print("held back")
sys.exit(75)
"""
    reader, writer = os.pipe()
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=writer,
        stderr=writer,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
    )
    os.close(writer)
    os.close(reader)
    process.communicate(b"")
    assert process.returncode == 75


def test_a_full_disk_is_no_reader_that_is_gone():
    full = Path("/dev/full").open("w")  # closed below, which raises too
    with pytest.raises(OSError, match="No space left"):
        print("x", file=Outlet(full), flush=True)
    with contextlib.suppress(OSError):
        full.close()


@pytest.mark.parametrize("dropped", [True, False])
def test_a_process_does_not_wait_for_a_step_that_was_dropped(monkeypatch, dropped):
    left = []

    def leave(status):
        left.append(status)
        raise SystemExit(status)

    def command(_, stop):
        stop.dropped = dropped
        return 1

    monkeypatch.setattr(main, "main", command)
    monkeypatch.setattr(os, "_exit", leave)
    streams = sys.stdout, sys.stderr
    try:
        with pytest.raises(SystemExit) as ended:
            main.run([])
    finally:
        sys.stdout, sys.stderr = streams
    assert ended.value.code == 1
    assert left == ([1] if dropped else [])
