"""The phases between the command and the first step, and their seconds."""

import os
import time
from pathlib import Path


class Phases:
    """Names and times consecutive phases.

    Args:
        age: Seconds that have passed already.
    """

    def __init__(self, age: float = 0.0):
        self._times: dict[str, float] = {}
        self._last = time.monotonic() - age

    def end(self, name: str) -> None:
        """Ends a phase that began with the last call, and names it."""
        now = time.monotonic()
        self._times[name] = self._times.get(name, 0.0) + now - self._last
        self._last = now

    def __str__(self) -> str:
        """Returns all phases and their sum, in seconds."""
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._times.items())
        return f"{sum(self._times.values()):.1f} s: {parts}"


def process_age() -> float | None:
    """Returns the seconds since this process began, or None if the system does not know them."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
        return uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None
