"""Runs lorax and its peers cell by cell on one machine; writes rows, a table and a plot.

    python -m scripts.bench.peers --call h200-1 --commit abc1234 \
        --out docs/measurements/step_h200.jsonl --plot docs/images/peers_h200.png

A cell is model:batch:seq:accumulation; a system is name:policy, such as lorax:full,
unsloth:offload (its default) or peft:none; lorax:full+embedding has the embedding in the host's
memory too, lorax:full:6 six layers that are not recomputed. Within a cell each peer's policy is a
process of its own, and lorax's policies share one, interleaved as in `scripts.bench.step`. The plot
shows all rows of the call in the file, so several runs may share one call; `--cells` with nothing
after it only draws.
"""

import argparse
import datetime
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from scripts.bench.rows import append_rows

CELLS = ["llama-8b:4:2048:1", "llama-8b:2:512:8", "llama-1b:8:2048:1", "llama-1b:1:512:1"]
_HOST = "+embedding"
SYSTEMS = ["lorax:none", "lorax:selective", "lorax:full", "unsloth:none", "unsloth:offload"]


def run_lorax(
    model: str,
    batch: str,
    seq: str,
    accumulation: str,
    policies: list[str],
    more: Sequence[str] = (),
) -> list[dict]:
    """Returns the rows of `scripts.bench.step`, in a process of its own for each `+embedding`."""
    if any(policy.endswith(_HOST) for policy in policies):
        here = [policy for policy in policies if not policy.endswith(_HOST)]
        there = [policy.removesuffix(_HOST) for policy in policies if policy.endswith(_HOST)]
        rows = run_lorax(model, batch, seq, accumulation, here, more) if here else []
        more = [*more, "--offload-embedding"]
        return rows + run_lorax(model, batch, seq, accumulation, there, more)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.jsonl"
        shape = ["--model", model, "--batch", batch, "--seq", seq, "--accumulation", accumulation]
        names = ["--policies", *policies, "--kernels", "auto", "--call", "-", "--commit", "-"]
        # Turns of at least a good part of a second; long steps need no more than one.
        tokens = int(batch) * int(seq) * int(accumulation)
        steps = ["--steps", str(max(1, min(40, 32768 // tokens)))]
        _run("scripts.bench.step", [*shape, *names, *steps, *more, "--out", str(out)])
        return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def run_peer(
    system: str, checkpoint: Path, batch: str, seq: str, accumulation: str, policy: str, bits: int
) -> list[dict]:
    """Returns the row of `scripts.bench.peer_step` in a process of its own."""
    shape = ["--batch", batch, "--seq", seq, "--accumulation", accumulation, "--policy", policy]
    shape += ["--bits", str(bits)]
    if int(seq) * int(batch) > 16384 or int(accumulation) > 1:
        shape += ["--warmup", "4", "--steps", "4"]
    printed = _run("scripts.bench.peer_step", [system, str(checkpoint), *shape])
    return [json.loads(printed.strip().splitlines()[-1])]


def _run(module: str, arguments: list[str]) -> str:
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-600:])
    return done.stdout


def find_checkpoint(model: str, folder: Path, tokenizer: str) -> Path:
    """Returns a checkpoint of random weights, written where there is none."""
    path = folder / model
    if not path.exists():
        _run("scripts.make.random_checkpoint", [model, str(path), "--tokenizer", tokenizer])
    return path


def draw(rows: list[dict], path: Path) -> None:
    """Draws speed against memory, a panel per cell, a curve per system."""
    import matplotlib.pyplot as plt

    cells = sorted({cell_of(row) for row in rows})
    figure, axes = plt.subplots(1, len(cells), figsize=(4.2 * len(cells), 3.6), squeeze=False)
    for panel, cell in zip(axes[0], cells, strict=True):
        inside = [row for row in rows if cell_of(row) == cell]
        for system in sorted({r["system"] for r in inside}):
            points = sorted((memory_of(r), r["tokens_per_s"], policy_of(r))
                            for r in inside if r["system"] == system)  # fmt: skip
            panel.plot([p[0] for p in points], [p[1] for p in points], "o-", label=system)
            for index, (x, y, policy) in enumerate(points):
                # Neighbours are named above and below, peers below, so that names do not meet.
                above = system == "lorax" and index % 2 == 0
                place = {"xytext": (0, 6 if above else -12), "ha": "center"}
                panel.annotate(policy, (x, y), fontsize=7, textcoords="offset points", **place)
        model, accumulation, batch, seq = cell
        panel.set_title(f"{model}, {accumulation} × {batch} × {seq}", fontsize=9)
        panel.set_xlabel("peak memory (GiB)")
        panel.set_xlim(0, 1.1 * max(map(memory_of, inside)))
        panel.set_ylim(0, 1.15 * max(row["tokens_per_s"] for row in inside))
        panel.legend(fontsize=8, loc="lower right")
    axes[0][0].set_ylabel("tokens/s")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Runs the cells and appends a row for each run that came through."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cells", nargs="*", default=CELLS)
    parser.add_argument("--systems", nargs="+", default=SYSTEMS)
    parser.add_argument("--base", choices=["bfloat16", "nf4_double"], default="bfloat16",
                        help="of both: nf4_double is what peers make of 4 bits")  # fmt: skip
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "peers")
    parser.add_argument("--tokenizer", default="examples/tiny/model")
    parser.add_argument("--call", required=True, help="names this run on this machine")
    parser.add_argument("--commit", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parsed = parser.parse_args()
    for cell in parsed.cells:
        model, batch, seq, accumulation = cell.split(":")
        shape = batch, seq, accumulation
        named = [name.split(":", 1) for name in parsed.systems]
        policies = [policy for system, policy in named if system == "lorax"]
        jobs: list[tuple[str, Callable[[], list[dict]]]] = []
        if policies:
            jobs.append(("lorax", functools.partial(
                run_lorax, model, *shape, policies, ["--base", parsed.base])))  # fmt: skip
        for system, policy in named:
            if system != "lorax":
                checkpoint = find_checkpoint(model, parsed.folder, parsed.tokenizer)
                bits = 16 if parsed.base == "bfloat16" else 4
                run = functools.partial(run_peer, system, checkpoint, *shape, policy, bits)
                jobs.append((f"{system}:{policy}", run))
        for name, job in jobs:
            try:
                rows = job()
            except RuntimeError as error:  # one that fails must not end the rest
                print(f"{cell:24s} {name:18s} failed: {error}", flush=True)
                continue
            for row in rows:
                row |= {"call": parsed.call, "model": model, "commit": parsed.commit}
                row["date"] = datetime.date.today().isoformat()
                print(table_line(row), flush=True)
            append_rows(parsed.out, rows)
    lines = parsed.out.read_text(encoding="utf-8").splitlines()
    everything = [row for row in map(json.loads, lines) if row["call"] == parsed.call]
    if parsed.plot:
        draw(everything, parsed.plot)
    for row in sorted(everything, key=cell_of):
        print(table_line(row))


def cell_of(row: dict) -> tuple:
    """Returns what rows to be compared have in common."""
    return row["model"], row["accumulation"], row["batch"], row["seq"]


def policy_of(row: dict) -> str:
    """Returns the policy in a word or two."""
    kept = row.get("kept_layers", 1)
    more = f":{kept}" if kept != 1 else ""
    return row["policy"] + more + (_HOST if row.get("offload_embedding") else "")


def memory_of(row: dict) -> float:
    """Returns the allocator's peak, or what the compiler planned where that is not known."""
    return row.get("peak_gib") or row["planned_gib"]


def table_line(row: dict) -> str:
    """Returns one line of the table."""
    cell = f"{row['model']} {row['accumulation']} x {row['batch']} x {row['seq']}"
    return (
        f"{cell:24s} {row['system'] + ' ' + policy_of(row):24s} {row['tokens_per_s']:10,.0f} "
        f"tokens/s {row['step_ms']:9.1f} ms {memory_of(row):7.2f} GiB"
    )


if __name__ == "__main__":
    main()
