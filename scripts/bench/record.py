"""Appends one row about a run's training step to a measurement file.

    python -m scripts.bench.record outputs/RUN --model llama-8b --call h200-1 --commit abc1234 \
        --out docs/measurements/step_h200.jsonl

Reads the run's config.yaml, versions.json and metrics.jsonl. Speed is the median over all steps but
the first two; memory is the allocator's peak.
"""

import argparse
import datetime
import json
import statistics
from pathlib import Path

from lorax.config.run import load_config
from lorax.report.log import METRICS_FILE, read_metrics
from scripts.bench.rows import append_rows

WARM_UP_STEPS = 2


def describe_run(run: Path, *, model: str, call: str, commit: str) -> dict:
    """Returns the row for the folder of a finished run."""
    config = load_config(run / "config.yaml")
    versions = json.loads((run / "versions.json").read_text(encoding="utf-8"))
    steps = [row for row in read_metrics(run / METRICS_FILE) if "step_seconds" in row]
    timed = steps[WARM_UP_STEPS:]
    if not timed:
        raise SystemExit(f"{run}: needs more than {WARM_UP_STEPS} steps, has {len(steps)}")
    train = config.train
    if train.gradient_checkpointing == "auto":
        raise SystemExit(f"{run}: the row needs the policy that ran, the config says auto")
    return {
        "call": call,
        "system": "lorax",
        "model": model,
        "base_dtype": config.model.dtype,
        "r": config.lora.r,
        "batch": train.per_device_train_batch_size,
        "accumulation": train.gradient_accumulation_steps,
        "seq": config.data.max_seq_length,
        "packing": config.data.packing,
        "policy": train.gradient_checkpointing,
        "kept_layers": 1 if train.kept_layers is None else train.kept_layers,
        "tokens_per_s": round(statistics.median(row["tokens_per_s"] for row in timed), 1),
        "step_ms": round(1e3 * statistics.median(row["step_seconds"] for row in timed), 2),
        "peak_gib": round(max(row["memory_gib"] for row in steps), 3),
        "mfu": round(statistics.median(row["mfu"] or 0.0 for row in timed), 4),
        "first_loss": round(steps[0]["loss"], 4),
        "last_loss": round(steps[-1]["loss"], 4),
        "steps": len(steps),
        "device": versions.pop("device"),
        "versions": versions,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    """Appends the row and prints it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--call", required=True, help="one id per call on a machine")
    parser.add_argument("--commit", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parsed = parser.parse_args()
    row = describe_run(parsed.run, model=parsed.model, call=parsed.call, commit=parsed.commit)
    append_rows(parsed.out, [row])
    print(json.dumps(row, indent=2))


if __name__ == "__main__":
    main()
