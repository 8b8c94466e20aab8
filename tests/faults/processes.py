"""Forked processes: what is tried in them cannot harm the one that counts; what they take."""

import contextlib
import math
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def start(work: Callable[[], Any], *, silent: bool = True) -> int:
    """Runs `work` in a forked process, which ends with what it returns; returns its number."""
    if (child := os.fork()) == 0:
        status = 70
        try:
            if silent:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, 1)
                os.dup2(nowhere, 2)
            status = int(work() or 0)
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except KeyboardInterrupt:
            status = 75
        except BaseException:
            status = 1
        finally:
            os._exit(status)
    return child


def wait(child: int, seconds: float) -> int | None:
    """Returns the exit status of a process, negative for a signal; None if it had to be killed."""
    return wait_and_count(child, seconds)[0]


def wait_and_count(child: int, seconds: float) -> tuple[int | None, float]:
    """Returns what `wait` does, and what the process has taken of the processor."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None, math.inf


def cpu_seconds(pid: int | str = "self") -> float:
    """Returns what a process has taken of the processor, with those that it has started."""
    seconds = 0.0
    with contextlib.suppress(OSError):  # it may have ended
        numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        seconds = sum(map(int, numbers[11:15])) / os.sysconf("SC_CLK_TCK")
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                seconds += cpu_seconds(child)
    return seconds


def in_child(work: Callable[[], bool], seconds: float = 600.0, *, silent: bool = True) -> bool:
    """Runs `work` in a forked process; says whether it returned True."""
    return wait(start(lambda: 0 if work() else 1, silent=silent), seconds) == 0


def read_status(name: str) -> int:
    """Returns bytes from /proc/self/status."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
