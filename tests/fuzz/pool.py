"""Worker processes that are watched: a case may neither hang, nor take the memory, nor end them."""

import contextlib
import dataclasses
import hashlib
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fuzz import kinds
from tests.fuzz.kinds import Case

ROOT = Path(__file__).parents[2]
SECONDS, MIB = 20.0, 2048
"""What a case may take: of the processor, and of the clock where no other work holds it up."""

_WORN_MIB = 1400
"""A worker that has grown to this makes way for a fresh one."""


@dataclasses.dataclass
class Outcome:
    """What became of a case.

    Attributes:
        status: The exit status; None if there was none.
        out: What was printed.
        err: What was printed as an error.
        error: The traceback of what escaped, or why the process was ended.
        seconds: By the clock.
        cpu_seconds: Of the processor, in all processes.
        peak_mib: Of resident memory.
        changed: Files that were written, changed or removed.
        reason: Why it is right that it was accepted; None if nothing says so.
    """

    status: int | None
    out: str = ""
    err: str = ""
    error: str | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_mib: float = 0.0
    changed: list[str] = dataclasses.field(default_factory=list)
    reason: str | None = None


class Worker:
    """One process; see `worker`."""

    def __init__(self, temporary: Path, garden: Path, clock_seconds: float):
        self.temporary, self.garden, self.clock_seconds = temporary, garden, clock_seconds
        self._process: subprocess.Popen[str] | None = None

    def run(self, case: Case) -> Outcome:
        """Runs a case in a fresh folder.

        Raises:
            UnfitError: If its edits cannot be made.
        """
        with self._prepared(case) as (place, words):
            folder, logs = place / "case", place / "logs"
            logs.mkdir()
            before, started = listing(folder), time.monotonic()
            said, killed = self._ask(
                {"do": "run", "words": words, "folder": str(folder), "logs": str(logs)}
            )
            read = lambda name: (
                (logs / name).read_text("utf-8", "replace") if (logs / name).exists() else ""
            )
            outcome = Outcome(None, read("out"), read("err"), killed)
            outcome.seconds = time.monotonic() - started
            if said is not None:
                outcome.status, outcome.error = said["status"], said["error"]
                outcome.seconds, outcome.cpu_seconds = said["seconds"], said["cpu_seconds"]
                outcome.peak_mib = said["peak_mib"]
            after = listing(folder)
            names = before.keys() | after.keys()
            outcome.changed = sorted(n for n in names if before.get(n) != after.get(n))
            if outcome.status == 0:
                request = {"do": "argue", "folder": str(folder), "out": outcome.out}
                argued, killed = self._ask(request | {"case": case.to_json()})
                argued = argued or {"reason": None, "error": killed}
                outcome.reason = argued["reason"]
                outcome.err += argued.get("error") or ""
            if outcome.peak_mib > _WORN_MIB or (said is not None and not said["is_alone"]):
                self.close()
            return outcome

    @contextlib.contextmanager
    def _prepared(self, case: Case) -> Iterator[tuple[Path, list[str]]]:
        place = self.temporary / f"{os.getpid()}-{threading.get_ident()}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        try:
            shutil.copytree(self.garden / case.variant, place / "case", symlinks=True)
            yield place, kinds.prepare(case, place / "case")
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _ask(
        self, request: dict[str, Any], clock_seconds: float | None = None
    ) -> tuple[Any, str | None]:
        """Returns the answer, or why there is none."""
        clock_seconds = clock_seconds or self.clock_seconds
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        answers: queue.Queue[str] = queue.Queue()
        reader = threading.Thread(target=lambda: answers.put(process.stdout.readline()))
        reader.start()
        end, why = time.monotonic() + clock_seconds, None
        while True:
            try:
                line = answers.get(timeout=0.05)
                break
            except queue.Empty:
                if _resident_mib(process.pid) > MIB:
                    why = f"took more than {MIB} MiB"
                elif time.monotonic() > end:
                    why = f"took more than {clock_seconds:g} s"
                if why:
                    process.kill()
        reader.join()
        if line.endswith("\n"):
            return json.loads(line), None
        status = process.wait()
        self.close()
        return None, why or f"the process ended with status {status}"

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            environment = worker_environment(self.temporary) | {"FUZZ_GARDEN": str(self.garden)}
            with (self.temporary / "workers.log").open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "tests.fuzz.worker"],
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    encoding="utf-8",
                )
            assert self._process.stdout is not None
            assert self._process.stdout.readline() == '"ready"\n', "the worker does not start"
            self._warm_up()
        return self._process

    def _warm_up(self) -> None:
        """Has the process import and compile what the first command needs."""
        folder = self.temporary / f"warm-{self._process.pid}"
        shutil.copytree(self.garden / "run", folder / "case")
        generate = ["generate", "run", "--prompt", "zq", "--max-new-tokens", "2"]
        for words in (["validate", "run.yaml"], generate):
            said, why = self._ask(
                {"do": "run", "words": words, "folder": str(folder / "case"), "logs": str(folder)},
                600,
            )
            assert said and said["status"] == 0, (said, why, (folder / "err").read_text())
        shutil.rmtree(folder)

    def close(self) -> None:
        """Ends the process; the next case starts another."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.kill()
        process.wait()
        process.stdout.close()


def worker_environment(temporary: Path) -> dict[str, str]:
    """Returns the environment of processes that run lorax here."""
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(temporary / "hub"),
        "TMPDIR": str(temporary),
    }
    if "JAX_COMPILATION_CACHE_DIR" not in environment:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(temporary / "programs")
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return environment


def _resident_mib(pid: int) -> float:
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20
    return 0.0


def listing(folder: Path) -> dict[str, str]:
    """Returns everything below a folder, with the digest of what each file holds."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(parent) / name
            if path.is_symlink():
                content = f"link to {os.readlink(path)}"
            elif path.is_file():
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                content = "folder" if path.is_dir() else "something else"
            found[str(path.relative_to(folder))] = content
    return found
