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
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tests.fuzz.edits import UnfitError
from tests.fuzz.judge import ACCEPTED, FAULT, REFUSED, judge
from tests.fuzz.kinds import KINDS, Case, draw_case, read_cases
from tests.fuzz.pool import MIB, SECONDS, Outcome, Worker, worker_environment

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


def run_cases(
    names: Iterable[tuple[str, int] | Case],
    temporary: Path,
    garden: Path,
    clock_seconds: float,
    workers: int,
) -> Iterator[dict[str, Any]]:
    """Runs cases, given whole or by kind and seed; an unfit seed gives way to another."""
    local = threading.local()
    made: list[Worker] = []

    def run(name: tuple[str, int] | Case) -> dict[str, Any]:
        if not hasattr(local, "worker"):
            local.worker = Worker(temporary, garden, clock_seconds)
            made.append(local.worker)
        if isinstance(name, Case):
            return describe(name, local.worker.run(name))
        kind, seed = name
        while True:
            case = draw_case(kind, seed, garden)
            try:
                return describe(case, local.worker.run(case))
            except UnfitError:
                seed += 1_000_000

    try:
        with ThreadPoolExecutor(workers) as pool:
            for done in as_completed([pool.submit(run, name) for name in names]):
                yield done.result()
    finally:
        for worker in made:
            worker.close()


def describe(case: Case, outcome: Outcome) -> dict[str, Any]:
    """Returns what is recorded of a case."""
    verdict, wrong = judge(case, outcome)
    row = case.to_json() | {"verdict": verdict, "status": outcome.status}
    row |= {"seconds": round(outcome.seconds, 3), "cpu_seconds": round(outcome.cpu_seconds, 3)}
    row |= {"peak_mib": round(outcome.peak_mib)}
    if wrong:
        return row | {"wrong": wrong, "said": outcome.err[-1500:], "error": outcome.error}
    said = outcome.err.partition(": error: ")[2].strip()
    return row | ({"reason": outcome.reason} if outcome.reason else {"said": said[:200]})


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
        slowest = max(row["cpu_seconds"] for row in of_kind)
        most = max(row["peak_mib"] for row in of_kind)
        lines.append(
            f"| {kind} | {len(of_kind):,} | {counts[REFUSED]:,} | {counts[ACCEPTED]:,} | "
            f"{counts[FAULT]:,} | {slowest:.1f} s | {most:,} MiB |"
        )
    return "\n".join(lines)


def list_reasons(rows: list[dict[str, Any]]) -> str:
    """Returns a table of why acceptances were right."""
    lines = ["| input | why it was right to accept it | cases |", "|---|---|---|"]
    reasons = ((row["kind"], row["reason"].partition(";")[0]) for row in rows if "reason" in row)
    for (kind, reason), count in sorted(collections.Counter(reasons).items()):
        lines.append(f"| {kind} | {reason} | {count:,} |")
    return "\n".join(lines)


def write_tables(document: Path, rows: list[dict[str, Any]]) -> None:
    """Puts the tables of a run into a document, between its two marks."""
    before, _, rest = document.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    tables = f"{summarise(rows)}\n\n{list_reasons(rows)}"
    document.write_text(f"{before}{MARKS[0]}\n{tables}\n{MARKS[1]}{after}", encoding="utf-8")


def origin(parsed: argparse.Namespace) -> dict[str, Any]:
    """Returns where and how a run was made."""
    from lorax.system.versions import library_versions

    return {
        "device": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": library_versions(),
        "commit": parsed.commit,
        "date": datetime.date.today().isoformat(),
        "seed": parsed.seed,
        "limits": {"seconds": parsed.seconds, "MiB": MIB},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0, help="the first; the others follow it")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--replay", nargs="*", metavar="'KIND SEED'", help="these cases alone")
    parser.add_argument("--found", type=Path, help="a file of cases; these alone")
    parser.add_argument("--out", type=Path, help="a file of JSON lines, one per case")
    parser.add_argument("--commit", default="")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which a case hangs")
    parser.add_argument("--temporary", type=Path, help="kept, with the sound inputs in it")
    parser.add_argument("--table", type=Path, help="a document whose table is made anew")
    parsed = parser.parse_args()
    rows = list(_run(parsed)) if parsed.cases or parsed.replay or parsed.found else []
    if parsed.out and rows:
        head = origin(parsed)
        rows.sort(key=lambda row: (row["seed"], row["kind"]))
        parsed.out.write_text("".join(json.dumps(row) + "\n" for row in (head, *rows)))
    elif parsed.out:
        rows = [json.loads(line) for line in parsed.out.read_text().splitlines()[1:]]
    if parsed.table:
        write_tables(parsed.table, rows)
    print(summarise(rows))
    return any(row["verdict"] == FAULT for row in rows)


def _run(parsed: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Runs the cases that were asked for, and prints faults as they are found."""
    each = -(-parsed.cases // len(parsed.kinds))
    names = [(kind, parsed.seed + i) for i in range(each) for kind in parsed.kinds]
    if parsed.replay is not None:
        names = [(name.rpartition(" ")[0], int(name.rpartition(" ")[2])) for name in parsed.replay]
    if parsed.found is not None:
        names = read_cases(parsed.found)
    with contextlib.ExitStack() as stack:
        temporary = parsed.temporary or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        temporary.mkdir(exist_ok=True)
        garden = temporary / "garden"
        if not garden.exists():
            make_garden(temporary)
        started = time.monotonic()
        for row in run_cases(names, temporary, garden, parsed.seconds, parsed.workers):
            yield row
            if row["verdict"] == FAULT or parsed.replay is not None or parsed.found is not None:
                print(f"{row['verdict']} {Case.from_json({k: row[k] for k in CASE})}")
                for wrong in row.get("wrong", [row.get("reason") or row.get("said", "")]):
                    print(f"    {wrong}", flush=True)
        print(f"{len(names)} cases in {time.monotonic() - started:.0f} s")


CASE = tuple(field.name for field in dataclasses.fields(Case))

if __name__ == "__main__":
    sys.exit(main())
