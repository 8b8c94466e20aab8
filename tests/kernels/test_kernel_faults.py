"""Faults planted into a copy of the kernels: the checks notice every one.

What they cannot notice: the interpreter runs products of the matrix units at once, so a slot of the
ring that is freed while its product still runs is not among the faults.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.fault_checks import CHECKS, NOTICED
from tests.kernels.planted import FAULTS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kernels" / "lorax_kernels"
# A guard against a deadlock, which is reported as one: what takes long has not found anything.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


class Checker:
    """The program that has imported what all checks need, and forks for each."""

    def __init__(self):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        self.program = subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.fault_checks"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, **request) -> int:
        """Returns the exit status of a check."""
        assert self.program.stdin is not None and self.program.stdout is not None
        print(json.dumps(request), file=self.program.stdin, flush=True)
        return int(self.program.stdout.readline())

    def end(self):
        """Ends it, and a check that hangs too."""
        os.killpg(self.program.pid, signal.SIGKILL)
        self.program.communicate()


@pytest.fixture(scope="module")
def checkers():
    """Those that run: one, or none behind a check that hung."""
    running = []
    yield running
    for checker in running:
        checker.end()


@pytest.fixture
def run_check(checkers, tmp_path):
    """Runs a check on a copy of the package in which one text of one file is another."""

    def run(check, file="kernel.py", old="\n", new="\n"):
        folder, log = tmp_path / "copy", tmp_path / "log"
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PACKAGE, folder / "lorax_kernels", ignore=ignore)
        path = folder / "lorax_kernels" / "lora_linear" / file
        path.write_text(path.read_text().replace(old, new))
        checker = checkers.pop() if checkers else Checker()
        try:
            status = checker.run(folder=str(folder), check=check, log=str(log))
        except BaseException:
            checker.end()
            raise
        checkers.append(checker)
        return status, log.read_text()[-4000:]

    return run


@pytest.mark.parametrize("check", CHECKS)
def test_the_package_as_it_is_passes_every_check(check, run_check):
    status, output = run_check(check)
    assert status == 0, output


def test_every_check_has_a_fault_to_notice():
    assert {fault[4] for fault in FAULTS} == set(CHECKS)


def test_every_fault_changes_one_place():
    for name, file, old, new, _ in FAULTS:
        assert (PACKAGE / "lora_linear" / file).read_text().count(old) == 1, name
        assert old != new


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[0].replace(" ", "_"))
def test_a_fault_is_noticed(fault, run_check):
    _, file, old, new, check = fault
    status, output = run_check(check, file, old, new)
    assert status == NOTICED, output or "the check passed"
