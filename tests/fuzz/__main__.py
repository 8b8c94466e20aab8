"""Runs the fuzzer and prints what became of the cases, by kind.

    python -m tests.fuzz --cases 2000 --seed 0 --out docs/measurements/fuzz.jsonl
    python -m tests.fuzz --replay "rows 17" "config 3"
    python -m tests.fuzz --cases 0 --out docs/measurements/fuzz.jsonl --table docs/reliability.md
"""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.fuzz.edits import UnfitError
from tests.fuzz.judge import ACCEPTED, FAULT, REFUSED, judge
from tests.fuzz.kinds import KINDS, Case, draw_case
from tests.fuzz.pool import Outcome, Worker, worker_environment

MARKS = "<!-- fuzz table -->", "<!-- end of fuzz table -->"


def make_garden(temporary: Path) -> Path:
    """Writes the sound inputs, in a process of its own."""
    garden = temporary / "garden"
    subprocess.run(
        [sys.executable, "-m", "tests.fuzz.seeds", str(garden)],
        check=True,
        env=worker_environment(temporary),
        capture_output=True,
    )
    return garden


def run_seeds(
    names: Iterable[tuple[str, int]], temporary: Path, garden: Path, clock_seconds: float, workers: int
) -> Iterator[dict[str, Any]]:
    """Runs the case of each kind and seed; one that is unfit gives way to the next seed of its own."""
    local = threading.local()
    made: list[Worker] = []

    def run(name: tuple[str, int]) -> dict[str, Any]:
        if not hasattr(local, "worker"):
            local.worker = Worker(temporary, garden, clock_seconds)
            made.append(local.worker)
        kind, seed = name
        while True:
            case = draw_case(kind, seed, garden)
            try:
                return describe(case, local.worker.run(case))
            except UnfitError:
                seed += 1_000_000

    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(run, names)
    for worker in made:
        worker.close()


def describe(case: Case, outcome: Outcome) -> dict[str, Any]:
    """Returns what is recorded of a case."""
    verdict, wrong = judge(case, outcome)
    row = case.to_json() | {"verdict": verdict, "status": outcome.status}
    row |= {"seconds": round(outcome.seconds, 3), "peak_mib": round(outcome.peak_mib)}
    row |= {"said": outcome.err[-1500:]} if verdict != ACCEPTED else {}
    row |= {"reason": outcome.reason} if outcome.reason else {}
    if wrong:
        row |= {"wrong": wrong, "error": (outcome.error or "")[-3000:]}
    return row


def summarise(rows: list[dict[str, Any]]) -> str:
    """Returns the table of a run."""
    lines = [
        "| input | cases | refused clearly | accepted, argued | faults | slowest | most memory |",
        "|---|---|---|---|---|---|---|",
    ]
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]
    for kind in [*kinds, "all"]:
        of_kind = [row for row in rows if kind in (row["kind"], "all")]
        counts = collections.Counter(row["verdict"] for row in of_kind)
        slowest = max(row["seconds"] for row in of_kind)
        most = max(row["peak_mib"] for row in of_kind)
        lines.append(
            f"| {kind} | {len(of_kind):,} | {counts[REFUSED]:,} | {counts[ACCEPTED]:,} | "
            f"{counts[FAULT]:,} | {slowest:.1f} s | {most:,} MiB |"
        )
    return "\n".join(lines)


def origin(commit: str, seed: int) -> dict[str, Any]:
    """Returns where a run was made."""
    from lorax.metrics import library_versions

    return {
        "device": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": library_versions(),
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "seed": seed,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0, help="the first; the others follow it")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--replay", nargs="*", metavar="'KIND SEED'", help="these cases alone")
    parser.add_argument("--out", type=Path, help="a file of JSON lines, one per case")
    parser.add_argument("--commit", default="")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="after which a case hangs")
    parser.add_argument("--temporary", type=Path, help="kept, with the sound inputs in it")
    parser.add_argument("--table", type=Path, help="a document whose table is made anew")
    parsed = parser.parse_args()
    each = -(-parsed.cases // len(parsed.kinds))
    names = [(kind, parsed.seed + i) for i in range(each) for kind in parsed.kinds]
    if parsed.replay is not None:
        names = [(name.rpartition(" ")[0], int(name.rpartition(" ")[2])) for name in parsed.replay]
    with contextlib.ExitStack() as stack:
        temporary = parsed.temporary or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        temporary.mkdir(exist_ok=True)
        garden = temporary / "garden"
        if not garden.exists():
            make_garden(temporary)
        rows, started = [], time.monotonic()
        for row in run_seeds(names, temporary, garden, parsed.seconds, parsed.workers):
            rows.append(row)
            if row["verdict"] == FAULT or parsed.replay is not None:
                print(f"{row['verdict']} {Case.from_json({k: row[k] for k in CASE})}")
                for wrong in row.get("wrong", [row.get("reason") or row.get("said", "")]):
                    print(f"    {wrong}", flush=True)
        print(f"{len(rows)} cases in {time.monotonic() - started:.0f} s")
    if parsed.out and rows:
        head = origin(parsed.commit, parsed.seed)
        parsed.out.write_text("".join(json.dumps(row) + "\n" for row in (head, *rows)))
    print(summarise(rows))
    return any(row["verdict"] == FAULT for row in rows)


CASE = tuple(field.name for field in dataclasses.fields(Case))

if __name__ == "__main__":
    sys.exit(main())
