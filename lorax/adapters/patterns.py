"""Regular expressions from a config or an adapter, tried in a process that can be stopped.

Matching can take exponential time, and nothing could end it within this process.
"""

import functools
import json
import re
import signal
import subprocess
import sys
from typing import NamedTuple

SECONDS = 2
"""Processor time for all patterns of one call; ordinary patterns take microseconds."""

_TRY = """
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds}))
except ImportError:
    pass
patterns, names = json.load(sys.stdin)
for index, pattern in enumerate(patterns):
    print(index, flush=True)
    for name in names:
        re.match(pattern, name)
        re.fullmatch(pattern, name)
"""

_REPEATS = re.compile(r"(?<!\\)[*+{]")


class Pattern(NamedTuple):
    """One of a setting's regular expressions.

    Attributes:
        setting: The setting's name.
        entry: The pattern as given.
        whole: The pattern as matched, against a whole name or its beginning.
    """

    setting: str
    entry: str
    whole: str

    @property
    def may_be_slow(self) -> bool:
        """Whether the entry has a repetition and the whole pattern several: no other is slow."""
        return bool(_REPEATS.search(self.entry)) and len(_REPEATS.findall(self.whole)) > 1


@functools.lru_cache(maxsize=8)
def find_slow(patterns: tuple[Pattern, ...], names: frozenset[str]) -> Pattern | None:
    """Returns a pattern that takes too long to be matched against all names, or None.

    If none can be slow, no process is started.
    """
    suspects = [pattern for pattern in patterns if pattern.may_be_slow]
    if not suspects:
        return None
    command = [sys.executable, "-I", "-S", "-c", _TRY.format(seconds=SECONDS)]
    asked = json.dumps([[pattern.whole for pattern in suspects], sorted(names)])
    try:
        done = subprocess.run(
            command, input=asked.encode(), capture_output=True, timeout=30 * SECONDS, check=False
        )
        status = done.returncode
        said = done.stdout
        failed = done.stderr
    except subprocess.TimeoutExpired as error:
        status = -signal.SIGKILL
        said = error.stdout or b""
        failed = b""
    if status > 0:
        raise RuntimeError(f"the process that tries patterns failed: {failed.decode()[-300:]}")
    # The process prints the number of each before it tries it. A signal ends it if that takes long.
    return suspects[int((said.split() or [b"0"])[-1])] if status < 0 else None
