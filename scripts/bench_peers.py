"""Runs lorax and its peers cell by cell on one machine; writes rows, a table and a plot.

    python scripts/bench_peers.py --call h200-1 --commit abc1234 \
        --out docs/measurements/step_h200.jsonl --plot docs/images/peers_h200.png

Every run is a process of its own, and the systems take turns within a cell, so that all meet the
same machine. A cell is model:batch:seq:accumulation; a system is name:policy, such as lorax:full,
unsloth:offload (its default) or peft:none.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPTS = Path(__file__).parent
CELLS = ["llama-8b:4:2048:1", "llama-8b:2:512:8", "llama-1b:8:2048:1", "llama-1b:1:512:1"]
SYSTEMS = ["lorax:none", "lorax:selective", "lorax:full", "unsloth:none", "unsloth:offload"]


def run_lorax(model: str, batch: str, seq: str, accumulation: str, policy: str) -> dict:
    """Returns the row of `bench_step.py` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.jsonl"
        shape = ["--model", model, "--batch", batch, "--seq", seq, "--accumulation", accumulation]
        names = ["--policies", policy, "--kernels", "auto", "--call", "-", "--commit", "-"]
        _run([str(SCRIPTS / "bench_step.py"), *shape, *names, "--out", str(out)])
        return json.loads(out.read_text(encoding="utf-8"))


def run_peer(
    system: str, checkpoint: Path, batch: str, seq: str, accumulation: str, policy: str
) -> dict:
    """Returns the row of `peer_step.py` in a process of its own."""
    shape = ["--batch", batch, "--seq", seq, "--accumulation", accumulation, "--policy", policy]
    printed = _run([str(SCRIPTS / "peer_step.py"), system, str(checkpoint), *shape])
    return json.loads(printed.strip().splitlines()[-1])


def _run(arguments: list[str]) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-600:])
    return done.stdout


def find_checkpoint(model: str, folder: Path, tokenizer: str) -> Path:
    """Returns a checkpoint of random weights, written where there is none."""
    path = folder / model
    if not path.exists():
        make = str(SCRIPTS / "make_random_checkpoint.py")
        _run([make, model, str(path), "--tokenizer", tokenizer])
    return path


def draw(rows: list[dict], path: Path) -> None:
    """Draws speed against memory, a panel per cell, a curve per system."""
    import matplotlib.pyplot as plt

    cells = sorted({(r["model"], r["batch"], r["seq"], r["accumulation"]) for r in rows})
    figure, axes = plt.subplots(1, len(cells), figsize=(4.2 * len(cells), 3.8), squeeze=False)
    for panel, cell in zip(axes[0], cells, strict=True):
        inside = [r for r in rows if (r["model"], r["batch"], r["seq"], r["accumulation"]) == cell]
        for system in sorted({r["system"] for r in inside}):
            points = sorted((r["peak_gib"], r["tokens_per_s"], r["policy"])
                            for r in inside if r["system"] == system)  # fmt: skip
            panel.plot([p[0] for p in points], [p[1] for p in points], "o-", label=system)
            for x, y, policy in points:
                panel.annotate(
                    policy, (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points"
                )
        model, batch, seq, accumulation = cell
        panel.set_title(f"{model}, {accumulation} × {batch} × {seq}", fontsize=9)
        panel.set_xlabel("peak memory, GiB")
        panel.set_ylim(0, None)
        panel.legend(fontsize=8)
    axes[0][0].set_ylabel("tokens/s")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Runs the cells and appends a row for each run that came through."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cells", nargs="+", default=CELLS)
    parser.add_argument("--systems", nargs="+", default=SYSTEMS)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "peers")
    parser.add_argument("--tokenizer", default="examples/tiny/model")
    parser.add_argument("--call", required=True, help="names this run on this machine")
    parser.add_argument("--commit", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parsed = parser.parse_args()
    rows = []
    for cell in parsed.cells:
        model, batch, seq, accumulation = cell.split(":")
        for name in parsed.systems:
            system, policy = name.split(":")
            shape = batch, seq, accumulation, policy
            try:
                if system == "lorax":
                    row = run_lorax(model, *shape)
                else:
                    checkpoint = find_checkpoint(model, parsed.folder, parsed.tokenizer)
                    row = run_peer(system, checkpoint, *shape)
            except RuntimeError as error:  # one that fails must not end the rest
                print(f"{cell:24s} {name:18s} failed: {error}", flush=True)
                continue
            row |= {"call": parsed.call, "model": model, "commit": parsed.commit}
            row["date"] = datetime.date.today().isoformat()
            rows.append(row)
            parsed.out.parent.mkdir(parents=True, exist_ok=True)
            with parsed.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"{cell:24s} {name:18s} {row['tokens_per_s']:10,.0f} tokens/s "
                f"{row['step_ms']:9.1f} ms {row['peak_gib']:7.2f} GiB",
                flush=True,
            )
    if parsed.plot and rows:
        draw(rows, parsed.plot)


if __name__ == "__main__":
    main()
