"""Runs the scorecard of faults, and prints what passed beside what others were measured to do.

    python -m tests.faults.scorecard                       # all of it: an hour on two cores
    python -m tests.faults.scorecard --short               # minutes
    python -m tests.faults.scorecard --only F1 R1 --count 50 --out docs/measurements/torture.json
    python -m tests.faults.scorecard --only --out … --table docs/reliability.md

Writes id → passed, total, seconds as JSON. Calls that change files are interposed with a small
library, built from `interpose.c` with the system's C compiler.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.processes import start, wait

HERE = Path(__file__).parent
MARKS = "<!-- table -->", "<!-- end of table -->"
PEERS = {
    "F1": "Orbax 16/16, HF Trainer 0/5 resumable",
    "F3": "Orbax 0/204 flips in tensors noticed, HF Trainer 0/10",
    "F4": "Orbax: the step before is intact, the partial one stays",
    "F5": "Orbax, asynchronous and not waited for: 0/10 saved, 3/10 hung",
    "F6": "Orbax deleted 2 of 4",
    "F7": "Orbax lost both in 1 of 3",
    "F8": "Orbax takes it, and fails",
    "F9": "HF Trainer saves 3/3 checkpoints of NaN",
    "R1": "HF Trainer 32/32",
    "R2": "HF Trainer refuses 1 of 5",
    "P1": "JAX, one process: the work is lost",
    "N1": "HF Trainer: loss 0.0 is logged and the run goes on",
    "D1": "datasets: 0 of 7 errors name file and line",
    "D2": "HF Trainer: loss 0.0, exit status 0",
    "S1": "transformers loads 3 of 3 shards outside the folder, PEFT takes 5 bad adapters",
}
"""As measured beforehand on a CPU; docs/reliability.md names the versions."""


def preload() -> None:
    """Starts this program again with the interposed calls, if it has not been."""
    if (loaded := os.environ.pop("LORAX_TORTURE", None)) is not None:
        Path(loaded).unlink()  # it stays in this process, and in those that it forks
        Path(loaded).parent.rmdir()
        return
    library = Path(tempfile.mkdtemp()) / "torture_faults.so"
    source = str(HERE / "interpose.c")
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), source, "-ldl"]
    subprocess.run(command, check=True)
    environment = os.environ | {"LD_PRELOAD": str(library), "JAX_PLATFORMS": "cpu"}
    environment |= {"LORAX_TORTURE": str(library)}
    command = [sys.executable, "-m", "tests.faults.scorecard", *sys.argv[1:]]
    os.execve(sys.executable, command, environment)


WITHOUT_CACHE = {"F1", "F2", "F3", "F4", "F6", "F7", "F8", "F9", "S1", "L1", "L2", "L3"}
"""They count, fail or kill calls that write, or measure memory: a cache's would be among them."""


def import_once() -> None:
    """Imports what the cases use, so that none of the many processes forked for them has to."""
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import tensorstore  # noqa: F401

    from lorax.cli.main import main  # noqa: F401
    from lorax.data.chat.tokenizer import WITHOUT_TORCH, load_tokenizer

    WITHOUT_TORCH.set()  # as the command does
    load_tokenizer(str(HERE.parents[1] / "examples" / "tiny" / "model"))


def title_of(run: Callable) -> str:
    """Returns what a case says it does."""
    return (run.__doc__ or "").splitlines()[0].partition(": ")[2].rstrip(".")


def write_table(document: Path, out: Path, titles: dict[str, str]) -> None:
    """Puts the results into the document, between its two marks."""
    lines = ["| | what happens | lorax | others |", "|---|---|---|---|"]
    found = json.loads(out.read_text())
    for name in (name for name in titles if name in found):
        row = found[name]
        score = f"{row['passed']}/{row['total']}"
        lines.append(f"| {name} | {titles[name]} | {score} | {PEERS.get(name, 'not measured')} |")
    text = document.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    table = "\n".join(lines)
    document.write_text(f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}", encoding="utf-8")


def save(out: Path | None, found: dict[str, dict], commit: str) -> None:
    """Adds the results to a file, beside those of other cases."""
    if out is None:
        return
    old = json.loads(out.read_text()) if out.exists() else {}
    where = {"date": datetime.date.today().isoformat(), "commit": commit}
    where |= {"device": f"{os.cpu_count()} cores, {platform.machine()}"}
    text = json.dumps(old | {k: v | where for k, v in found.items()}, indent=1, sort_keys=True)
    out.write_text(text + "\n")


def run_apart(
    run: Callable[[int, Path], tuple[Any, ...]], count: int, folder: Path, may_cache: bool
) -> tuple[int, int, dict[str, float]]:
    """Runs a case in a forked process: once JAX has threads, a process must not fork again.

    Args:
        run: The case.
        count: Its trials.
        folder: Its own.
        may_cache: Whether JAX may keep what it compiles where the environment says.

    Returns:
        What passed, of how many, and figures that it measured, by name.
    """
    import jax

    result = folder / "result.json"

    def work() -> None:
        try:
            jax.config.update("jax_enable_compilation_cache", may_cache)
            result.write_text(json.dumps(run(count, folder)))
        except BaseException:
            traceback.print_exc()
            raise

    if wait(start(work, silent=False), 86_400) != 0:
        return 0, 1, {}
    passed, total, *figures = json.loads(result.read_text())
    return passed, total, figures[0] if figures else {}


def main() -> int:
    """Runs the cases and returns 0 if all passed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", metavar="ID", help="nothing after it: only --table")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--count", type=int, help="trials of each case")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="")
    parser.add_argument("--table", type=Path, help="a document whose table is made anew from --out")
    parsed = parser.parse_args()
    preload()
    with tempfile.TemporaryDirectory() as temporary:
        from tests.faults import checkpoints, inputs, loads, runs, signals

        import_once()
        cases = checkpoints.CASES | signals.CASES | runs.CASES
        cases |= inputs.CASES | loads.CASES
        unknown = sorted(set(parsed.only or ()) - cases.keys())
        if unknown:
            parser.error(f"there is no case {unknown[0]}, only {', '.join(cases)}")
        found = {}
        for name in cases if parsed.only is None else parsed.only:
            run, many, few = cases[name]
            count = parsed.count if parsed.count is not None else few if parsed.short else many
            folder = Path(temporary) / name
            folder.mkdir()
            started = time.monotonic()
            may_cache = name not in WITHOUT_CACHE
            passed, total, figures = run_apart(run, count, folder, may_cache)
            seconds = round(time.monotonic() - started, 1)
            found[name] = {"passed": passed, "total": total, "seconds": seconds} | figures
            save(parsed.out, found, parsed.commit)
            title = title_of(run)
            peer = f" [{PEERS[name]}]" if name in PEERS else ""
            print(f"{name:4s} {passed:4d}/{total:<4d} {seconds:7.1f} s  {title}{peer}", flush=True)
    if parsed.table is not None:
        write_table(
            parsed.table, parsed.out, {name: title_of(case[0]) for name, case in cases.items()}
        )
    return 0 if all(row["passed"] == row["total"] > 0 for row in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
