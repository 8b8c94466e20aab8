"""Times training on short examples, packed and padded, and compares their losses.

    python -m scripts.bench.packing --call h200-1 --commit abc1234 \
        --out docs/measurements/packing_h200.jsonl

Rows of 50 to 800 random tokens, most of them short (log-normal around 180), one epoch over the
same rows through `lorax.Trainer`: packed into rows of 2,048, and padded to the longest row of a
batch as the trainer does it, at as many tokens per micro-batch at most. Speed counts the rows' own
tokens, over whole steps after the first three. The held-out loss of the same weights is that of
the same rows, packed and padded; so the two must be equal.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np

from lorax import Trainer, load_config
from lorax.data.dataset import EncodedDataset
from scripts.bench.rows import append_rows, origin
from scripts.bench.step import build_model

LONGEST = 800
SHORTEST = 50


def draw_rows(count: int, vocabulary: int, seed: int) -> EncodedDataset:
    """Returns rows of random tokens, all supervised."""
    random = np.random.default_rng(seed)
    lengths = np.clip(random.lognormal(np.log(180), 0.7, count), SHORTEST, LONGEST).astype(int)
    rows = [random.integers(4, vocabulary, n) for n in lengths]
    return EncodedDataset.from_rows((row, np.ones(len(row), bool)) for row in rows)


def train(model, packing: bool, rows: EncodedDataset, held_out: EncodedDataset, folder: str):
    """Returns the step events and the held-out loss before training."""
    settings = {
        "data.train": "in memory",
        "data.eval": "in memory",
        "data.packing": str(packing).lower(),
        # Four packed rows hold as many tokens as sixteen padded ones of their mean width.
        "train.per_device_train_batch_size": 4 if packing else 16,
        "train.gradient_accumulation_steps": 1,
        "train.num_train_epochs": 1,
        "train.gradient_checkpointing": "none",
        "eval.strategy": "epoch",
        "eval.per_device_eval_batch_size": 4,
        "save.output_dir": f"{folder}/{packing}",
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    config = load_config("configs/llama3_8b_lora.yaml", overrides)
    events: list[dict] = []
    trainer = Trainer(model, config, rows, held_out, listeners=(events.append,))
    result = trainer.train()
    return [event for event in events if "loss" in event], result.eval_loss_before


def main() -> None:
    """Runs both and appends a row for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="llama-1b")
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--call", required=True, help="names this run on this machine")
    parser.add_argument("--commit", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parsed = parser.parse_args()
    model = build_model(parsed.model, 16)
    rows = draw_rows(parsed.rows, model.config.vocab_size, 0)
    held_out = draw_rows(64, model.config.vocab_size, 1)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for packing in (True, False):
            model.gradient_checkpointing = "none"
            steps, before = train(model, packing, rows, held_out, folder)
            timed = steps[3:-1]  # the last step may be filled up with empty rows
            seconds = sum(step["step_seconds"] for step in timed)
            found[packing] = {
                "call": parsed.call,
                "system": "lorax",
                "model": parsed.model,
                "packing": packing,
                "rows": len(rows),
                "mean_length": round(float(np.mean(rows.lengths)), 1),
                "steps": len(timed),
                "tokens_per_s": round(sum(step["tokens"] for step in timed) / seconds, 1),
                "step_ms": round(statistics.median(s["step_seconds"] for s in timed) * 1e3, 2),
                "held_out_loss": before,
                **origin(parsed.commit),
            }
    append_rows(parsed.out, found.values())
    for row in found.values():
        print(json.dumps({k: v for k, v in row.items() if k not in ("versions", "device")}))
    print(f"packed / padded: {found[True]['tokens_per_s'] / found[False]['tokens_per_s']:.2f}")


if __name__ == "__main__":
    main()
