"""Measures whether a step and a resumed run repeat bit for bit, and the cost of the guard.

    python -m scripts.bench.determinism --part step --call h200-1 --commit abc1234 \
        --out docs/measurements/determinism_h200.jsonl

The step of a model with random weights runs many times from one state; a digest of every bit of the
new state counts the different results. It is timed interleaved with a step of
`train.full_determinism`, and with one without the guard against numbers that are not finite. The
next part resumes a run of a smaller model from its middle, in a process of its own, where XLA
chooses its matmuls independently, and compares it with the run that never stopped, with
`train.full_determinism` and without. The last part measures how long saving holds a run up.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

import lorax.training.step
from lorax import Trainer, load_config
from lorax.config.train import TrainConfig
from lorax.models.stack.recompute import Recomputation
from lorax.recovery.files import read_checkpoint
from lorax.training.optim.optimizer import make_optimizer
from scripts.bench.packing import draw_rows
from scripts.bench.rows import append_rows, origin
from scripts.bench.step import (
    Compiled,
    Variant,
    build_model,
    compile_variant,
    draw_batch,
    time_in_turns,
)

SELECTIVE = Recomputation("selective")


@jax.jit
def digest(tree: Any) -> jax.Array:
    """Returns 32 bits that depend on every bit of every leaf and on where it stands."""
    total = jnp.uint32(0)
    for index, leaf in enumerate(jax.tree.leaves(tree)):
        if leaf.dtype.itemsize != 4:
            continue
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32).reshape(-1)
        place = jax.lax.iota(jnp.uint32, bits.size) + jnp.uint32(index)
        total += (bits * (place * jnp.uint32(2654435761) | jnp.uint32(1))).sum(dtype=jnp.uint32)
    return total


def compile_unguarded(model, batch):
    """Returns a step that applies every update, as if all numbers were finite."""
    plain = lorax.training.step.jnp
    names = {name: getattr(plain, name) for name in dir(plain) if not name.startswith("__")}
    unguarded: Any = SimpleNamespace(**names | {"where": lambda _, new, __: new})
    lorax.training.step.jnp = unguarded
    try:
        return compile_variant(model, Variant("auto", SELECTIVE), batch)
    finally:
        lorax.training.step.jnp = plain


def compile_repeatable(model, batch) -> Compiled:
    """Returns the step that is to come to the same bits every time."""
    optimizer = make_optimizer(TrainConfig(learning_rate=2e-4), 1_000_000)
    step, state = lorax.training.step.make_train_step(model, optimizer, full_determinism=True)
    begin = time.perf_counter()
    compiled = step.compile(state, batch).compiled
    return Compiled(compiled, step.frozen, state, time.perf_counter() - begin)


def repeat(compiled, batch, times: int) -> int:
    """Returns how many different states a step came to from one state."""
    start = jax.tree.map(jnp.copy, compiled.state)
    found = set()
    for _ in range(times):
        state, _ = compiled.step(jax.tree.map(jnp.copy, start), compiled.frozen, batch)
        found.add(int(digest(state)))
    return len(found)


def run_trainer(
    model_name: str, folder: Path, full_determinism: bool, resume: bool = False
) -> list[float]:
    """Trains in a folder, or resumes there; returns how long each save held it up."""
    model = build_model(model_name, 16)
    model.gradient_checkpointing = "none"
    settings = {
        "data.train": "in memory",
        "data.packing": "true",
        "train.per_device_train_batch_size": 4,
        "train.gradient_accumulation_steps": 2,
        "train.gradient_checkpointing": "none",
        "train.max_steps": 8,
        "train.full_determinism": str(full_determinism).lower(),
        "eval.strategy": "no",
        "save.save_steps": 4,
        "save.output_dir": folder,
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    config = load_config("configs/llama3_8b_lora.yaml", ["data.eval=[]", *overrides])
    rows = draw_rows(200, model.config.vocab_size, 0)
    trainer = Trainer(model, config, rows, resume=resume)
    held = watch_saves(trainer.saver)
    trainer.train()
    return held


def watch_saves(saver) -> list[float]:
    """Returns a list that gets the seconds of every save, of the weights and a checkpoint."""
    held: list[float] = []

    def timed(save: Callable[..., bool], begins: bool) -> Callable[..., bool]:
        def call(*arguments, **options):
            begin = time.perf_counter()
            found = save(*arguments, **options)
            seconds = time.perf_counter() - begin
            held.append(seconds) if begins else held.append(held.pop() + seconds)
            return found

        return call

    saver.save_weights, saver.save = timed(saver.save_weights, True), timed(saver.save, False)
    return held


def compare_resumed(model_name: str, folder: Path, full_determinism: bool) -> dict[str, Any]:
    """Returns whether a resumed run equals one that never stopped."""
    run_trainer(model_name, folder / "straight", full_determinism)
    shutil.copytree(folder / "straight", folder / "resumed")
    shutil.rmtree(folder / "resumed" / "checkpoints" / "step-000000008")
    command = [sys.executable, "-m", "scripts.bench.determinism", "--part", "go-on"]
    command += ["--resumed-model", model_name, "--folder", str(folder / "resumed")]
    command += ["--full-determinism", str(full_determinism)]
    subprocess.run(command, check=True)
    last = [folder / n / "checkpoints" / "step-000000008" for n in ("straight", "resumed")]
    straight, resumed = (read_checkpoint(path).arrays for path in last)
    equal = sum(straight[k].tobytes() == resumed[k].tobytes() for k in straight)
    return {"arrays": len(straight), "equal_after_resume": equal}


def measure_step(parsed: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns a row per way to compile the step: its time, and how many results it came to."""
    model = build_model(parsed.model, 16)
    batch = draw_batch(model.config.vocab_size, 1, 4, 2048)
    ways = {
        "default": lambda: compile_variant(model, Variant("auto", SELECTIVE), batch),
        "unguarded": lambda: compile_unguarded(model, batch),
        "full_determinism": lambda: compile_repeatable(model, batch),
    }
    variants = {name: ways[name]() for name in ("default", *parsed.compiled)}
    times = time_in_turns(variants, batch, parsed.turns, 3)
    rows = []
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times["default"], strict=True)]
        row = {"call": parsed.call, "part": "step", "model": parsed.model, "compiled": name}
        row |= {"step_ms": round(statistics.median(seconds) * 1e3, 2)}
        row |= {"ratio": round(statistics.median(ratios), 4)}
        row |= {"planned_gib": round(variants[name].planned_gib, 3)}
        if name != "unguarded":
            results = repeat(variants[name], batch, parsed.repeats)
            row |= {"repeats": parsed.repeats, "different_results": results}
        rows.append(row)
    return rows


def measure_resume(parsed: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns rows about a run that is stopped and resumed."""
    rows = []
    for wanted in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            found = compare_resumed(parsed.resumed_model, Path(folder), wanted)
        row = {"call": parsed.call, "part": "resume", "model": parsed.resumed_model}
        rows.append(row | {"full_determinism": wanted} | found)
    return rows


def measure_save(parsed: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns a row about how long saving the adapters of the larger model takes."""
    with tempfile.TemporaryDirectory() as folder:
        held = run_trainer(parsed.model, Path(folder), full_determinism=False)
    row = {"call": parsed.call, "part": "save", "model": parsed.model}
    return [row | {"held_up_s": [round(seconds, 3) for seconds in held]}]


def main() -> None:
    """Measures one part and appends its rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=("step", "resume", "save", "go-on"), required=True)
    parser.add_argument("--model", default="llama-8b")
    parser.add_argument("--resumed-model", default="llama-1b")
    others = ["unguarded", "full_determinism"]
    parser.add_argument("--compiled", nargs="+", choices=others, default=others, metavar="WAY")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--call", default="", help="names this run on this machine")
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, default=Path("determinism.jsonl"))
    parser.add_argument("--folder", type=Path, help="of the run that goes on")
    parser.add_argument("--full-determinism", choices=("True", "False"), default="False")
    parsed = parser.parse_args()
    if parsed.part == "go-on":
        wanted = parsed.full_determinism == "True"
        run_trainer(parsed.resumed_model, parsed.folder, wanted, resume=True)
        return
    measure = {"step": measure_step, "resume": measure_resume, "save": measure_save}
    rows = measure[parsed.part](parsed)
    for row in rows:
        print(json.dumps(row))
    append_rows(parsed.out, [row | origin(parsed.commit) for row in rows])


if __name__ == "__main__":
    main()
