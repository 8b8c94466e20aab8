"""Measures `lora_linear` against cuBLAS and XLA, and appends one row per cell.

    python -m scripts.bench.kernels --commit abc1234 --out docs/measurements/kernels_h200.jsonl

For every workload, number of rows and rank, it times, interleaved in one process, the frozen
matmuls alone through cuBLAS (x·W0; x·W0 and dy·W0ᵀ), XLA's LoRA at its best, and the fused kernel.
A ratio is the median over the turns of a time over the frozen matmuls' in the same turn. Errors are
relative L2 distances from float32 matmuls at the highest precision, the largest over y, dx, dA and
dB.
"""

import argparse
import dataclasses
import datetime
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lorax_kernels import LoraWeights, lora_linear_group, lora_swiglu
from lorax_kernels.device import CUBLAS_ONLY
from lorax_kernels.lora_linear.reference import lora_linear_reference
from lorax_kernels.timing import compile_all, time_interleaved
from lorax_kernels.workloads import SIZES, Workload, draw, model_workloads

SCALE = 2.0
WHAT = ("fwd", "fwd_bwd")
ERROR_ROWS = 256
SET_BYTES = 24e9  # operand sets in memory at a time


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement."""

    workload: Workload
    m: int
    r: int
    what: str
    dropout: float = 0.0


def operand_sets(workload: Workload, m: int, r: int) -> list[tuple]:
    """Returns (x, weights, adapters, dys) per set; adapters are float32 as in training."""
    make = jax.jit(draw, static_argnums=(1, 2, 3))
    k = workload.k
    bf16 = jnp.bfloat16
    outputs = 1 if workload.swiglu else len(workload.ns)
    one = 2.0 * (m * k + sum(workload.ns) * (k + 3 * m))
    sets = []
    for i in range(max(1, min(3, int(SET_BYTES // one)))):
        weights = [make(i + 10 * j, (k, n), k**-0.5, bf16) for j, n in enumerate(workload.ns)]
        adapters = [
            (make(40 + i + 10 * j, (k, r), k**-0.5, jnp.float32),
             make(70 + i + 10 * j, (r, n), 0.3, jnp.float32))
            for j, n in enumerate(workload.ns)
        ]  # fmt: skip
        dys = [make(100 + i + 10 * j, (m, workload.ns[j]), 1.0, bf16) for j in range(outputs)]
        sets.append((make(200 + i, (m, k), 1.0, bf16), weights, adapters, dys))
    return sets


def apply(workload: Workload, x, weights, adapters, *, kernels: str, rate: float, singly=False):
    """Runs the operation under test."""
    members = [
        LoraWeights(w, a, b, scale=SCALE) for w, (a, b) in zip(weights, adapters, strict=True)
    ]
    options: dict[str, Any] = {"kernels": kernels, "dropout_rate": rate}
    if rate:
        options["dropout_key"] = jax.random.key(7)
    if workload.swiglu:
        return [lora_swiglu(x, members[0], members[1], recompute=True, **options)]
    groups = [[member] for member in members] if singly else [members]
    return [y for group in groups for y in lora_linear_group(x, group, **options)]


def programs_of(cell: Cell) -> dict[str, tuple]:
    """Returns name → (function of one operand set, compiler options); the base first."""
    workload = cell.workload
    backward = cell.what == "fwd_bwd"

    def base(x, weights, adapters, dys):
        y = [x @ w for w in weights]
        if workload.swiglu:
            y = [jax.nn.silu(y[0]) * y[1]]
        dx = [dy @ w.T for dy, w in zip(dys, weights, strict=True)] if backward else []
        return y, dx

    def lora(kernels: str, rate: float = cell.dropout, singly: bool = False):
        def run(x, weights, adapters, dys):
            def function(x, adapters):
                return apply(
                    workload, x, weights, adapters, kernels=kernels, rate=rate, singly=singly
                )

            if not backward:
                return function(x, adapters)
            y, pull = jax.vjp(function, x, adapters)
            return y, pull(dys)

        return run

    programs = {
        "base": (base, CUBLAS_ONLY),
        "xla": (lora("xla"), CUBLAS_ONLY),
        "ours": (lora("pallas"), CUBLAS_ONLY),
    }
    if cell.dropout:
        programs["ours_without_dropout"] = (lora("pallas", 0.0), CUBLAS_ONLY)
    elif len(workload.ns) > 1 and not workload.swiglu:
        programs["ours_singly"] = (lora("pallas", singly=True), CUBLAS_ONLY)
    return programs


def worst_error(cell: Cell, operands, results) -> float:
    """Returns the largest relative L2 error: y and dx on some rows, dA and dB whole."""
    workload = cell.workload
    backward = cell.what == "fwd_bwd"

    def wide(tree):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    def some(tree):
        return jax.tree.map(lambda leaf: wide(leaf[:ERROR_ROWS]), tree)

    def forward(x, weights, adapters):
        y = [
            lora_linear_reference(x, w, a, b, scale=SCALE)
            for w, (a, b) in zip(wide(weights), adapters, strict=True)
        ]
        return [jax.nn.silu(y[0]) * y[1]] if workload.swiglu else y

    @jax.jit
    def exact(x, weights, adapters, dys):
        if not backward:
            return forward(some(x), weights, adapters)
        y, pull = jax.vjp(lambda x: forward(x, weights, adapters), some(x))
        (dx,) = pull(some(dys))
        gradients = [
            (SCALE * wide(x).T @ (wide(dy) @ b.T), SCALE * (wide(x) @ a).T @ wide(dy))
            for (a, b), dy in zip(adapters, dys, strict=True)
        ]
        return y, dx, gradients

    with jax.default_matmul_precision("highest"):
        want = exact(*operands)
    got = results
    if backward:
        y, (dx, gradients) = results
        got = ([v[:ERROR_ROWS] for v in y], dx[:ERROR_ROWS], gradients)
    else:
        got = [v[:ERROR_ROWS] for v in results]

    def distance(p, q):
        return jnp.linalg.norm(p.astype(jnp.float32) - q) / jnp.linalg.norm(q)

    return float(max(jax.tree.leaves(jax.tree.map(distance, got, want))))


def cells(parsed: argparse.Namespace) -> Iterator[Cell]:
    """Yields what to measure, the widest interest first."""
    for m, r, model in itertools.product(parsed.rows, parsed.ranks, parsed.models):
        for workload in model_workloads(model):
            if parsed.layers and workload.name.split("/")[1] not in parsed.layers:
                continue
            for what in parsed.what:
                if what == "fwd" or not workload.swiglu:
                    yield Cell(workload, m, r, what, parsed.dropout)


def measure(cell: Cell, turns: int, turn_ms: float, errors: bool) -> dict:
    """Returns the cell's row."""
    sets = operand_sets(cell.workload, cell.m, cell.r)
    compiled, failed = compile_all(programs_of(cell), sets)
    if missing := {"base", "ours"} & failed.keys():
        raise SystemExit(f"{cell}: {', '.join(sorted(missing))} did not compile: {failed}")
    timings = time_interleaved(compiled, sets, turns=turns, turn_ms=turn_ms)
    # Errors are measured without dropout: the reference here has none.
    errors = errors and not cell.dropout
    error = worst_error(cell, sets[0], compiled["ours"](sets)[0]) if errors else None
    row = {
        "workload": cell.workload.name,
        "m": cell.m,
        "k": cell.workload.k,
        "n": sum(cell.workload.ns),
        "r": cell.r,
        "what": cell.what,
        "dropout": cell.dropout,
        **{f"{name}_us": round(t.us, 2) for name, t in timings.items()},
        **{f"ratio_{name}": round(t.ratio, 4) for name, t in timings.items() if name != "base"},
        "error": None if error is None else float(f"{error:.3g}"),
    }
    if failed:
        row["failed"] = failed
    return row


def main() -> None:
    """Measures cell by cell until the time is up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rows", nargs="+", type=int, default=[8192, 2048, 16384])
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 64, 8, 128])
    parser.add_argument("--layers", nargs="+", help="such as qkv o_proj; all if not given")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--turn-ms", type=float, default=12.0)
    parser.add_argument("--no-errors", action="store_true", help="time only")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin nothing after this")
    parser.add_argument("--commit", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parsed = parser.parse_args()
    begin = time.monotonic()
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    for cell in cells(parsed):
        if time.monotonic() - begin > parsed.seconds:
            print(f"out of time before {cell}")
            break
        row = measure(cell, parsed.turns, parsed.turn_ms, not parsed.no_errors)
        row |= {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "commit": parsed.commit,
            "date": datetime.date.today().isoformat(),
        }
        with parsed.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = {name: row[name] for name in row if name.startswith(("ratio", "base", "failed"))}
        print(
            f"{cell.workload.name:26s} m {cell.m} r {cell.r} {cell.what:7s} {shown} {row['error']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
