"""Measures the dequantisation of NF4 matrices, and appends one row per program and shape.

    python -m scripts.bench.nf4 --commit abc1234 --out docs/measurements/nf4_h200.jsonl

Interleaved within one process: a copy in bfloat16, XLA, the kernel's variants, and `Nf4.dense`
with double quantisation. The bytes of a program are those that it must read and write. Every
program's values are compared with XLA's, bit by bit, before the timing. Then matmuls of `--rows`
rows: one with the bfloat16 matrix, and those that dequantise the matrix first.
"""

import argparse
import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lorax_kernels.device import CUBLAS_ONLY, device_kind, runs_kernels
from lorax_kernels.timing import compile_all, time_interleaved
from lorax_kernels.weights.nf4 import Nf4, quantise
from scripts.bench.rows import append_rows, origin

BF16 = jnp.dtype(jnp.bfloat16)
SHAPES = ("4096x4096", "14336x4096", "4096x1024")
SET_BYTES = 4e8  # of all operand sets together: several times the L2 cache


@dataclasses.dataclass(frozen=True)
class Program:
    """A program to time.

    Attributes:
        run: Function of the matrix in bfloat16, in NF4 and in NF4 with double quantisation.
        bytes_each: Bytes read and written per weight.
    """

    run: Callable[[jax.Array, Nf4, Nf4], jax.Array]
    bytes_each: float


def operand_sets(n: int, k: int) -> list[tuple[jax.Array, Nf4, Nf4]]:
    """Returns matrices, each in bfloat16, in NF4 and in NF4 with double quantisation."""

    @jax.jit
    def make(seed: int):
        matrix = jax.random.normal(jax.random.key(seed), (k, n), jnp.float32) * k**-0.5
        narrow = matrix.astype(BF16)
        return narrow, quantise(narrow), quantise(narrow, double=True)

    return [make(seed) for seed in range(max(3, math.ceil(SET_BYTES / (3 * n * k))))]


def programs(levels: list[str], lines: list[int]) -> dict[str, Program]:
    """Returns the programs by name, the copy first."""
    found = {
        "copy": Program(lambda matrix, _, __: -matrix, 4),
        "xla": Program(lambda _, stored, __: in_xla(stored), 2 + 1 / 2 + 4 / 64),
    }
    for how, each, staged in itertools.product(levels, lines, (False, True)):
        name = f"{how}-{each}{'-staged' if staged else ''}"
        found[name] = Program(in_kernel(how, each, staged), 2 + 1 / 2 + 4 / 64)
    found["dense, double"] = Program(lambda _, __, twice: twice.dense().T, 2 + 1 / 2 + 1 / 64)
    return found


def in_xla(stored: Nf4) -> jax.Array:
    """Returns the matrix (n, k), dequantised by XLA: the kernel has no float32."""
    return stored.dense(jnp.float32).T.astype(BF16)


def in_kernel(levels: Any, lines: int, staged: bool) -> Callable[..., jax.Array]:
    """Returns the program of a variant of the kernel."""
    from lorax_kernels.weights.nf4.kernel import Variant, dequantise

    variant = Variant(levels, lines, staged)

    def run(_, stored: Nf4, __):
        return dequantise(stored.codes, stored.scales(), BF16, variant)

    return run


@jax.jit
def count_unequal(got: jax.Array, want: jax.Array) -> jax.Array:
    """Returns the number of values whose bits differ."""
    parts = [jax.lax.bitcast_convert_type(v.reshape(-1), jnp.uint16) for v in (got, want)]
    return (parts[0] != parts[1]).sum()


def compare(name: str, result: jax.Array, operands: tuple[jax.Array, Nf4, Nf4]) -> int:
    """Returns the number of values in a program's result that differ from XLA's."""
    matrix, stored, twice = operands
    if name == "copy":
        return int(count_unequal(result, -matrix))
    if name == "dense, double":
        return int(count_unequal(result, jax.jit(in_xla)(twice)))
    return int(count_unequal(result, jax.jit(in_xla)(stored)))


def measure(n: int, k: int, parsed: argparse.Namespace) -> tuple[list[dict], int]:
    """Returns the rows of a shape, and the number of programs that failed or were wrong."""
    sets = operand_sets(n, k)
    found = programs(parsed.levels, parsed.lines)
    compiled, failed = compile_all({name: (each.run, None) for name, each in found.items()}, sets)
    for name, message in failed.items():
        print(f"{n} x {k} {name}: {message}", flush=True)
    unequal = {
        name: sum(map(compare, [name] * len(sets), program(sets), sets))
        for name, program in compiled.items()
    }
    timings = time_interleaved(
        compiled, sets, turns=parsed.turns, turn_ms=parsed.turn_ms, lead_ms=parsed.lead_ms
    )
    rows = []
    for name, timing in timings.items():
        terabytes = n * k * found[name].bytes_each / timing.us / 1e6
        print(f"{n} x {k} {name:22s} {timing.us:8.2f} us {terabytes:6.3f} TB/s", end=" ")
        print(f"{timing.ratio:.3f} of a copy, {unequal[name]} unequal", flush=True)
        row = {"n": n, "k": k, "program": name, "us": round(timing.us, 2)}
        row |= {"tb_s": round(terabytes, 3), "ratio_copy": round(timing.ratio, 4)}
        rows.append(row | {"sets": len(sets), "unequal": unequal[name]})
    return rows, len(failed) + sum(map(bool, unequal.values()))


def measure_matmuls(n: int, k: int, parsed: argparse.Namespace) -> list[dict]:
    """Returns the rows of matmuls with a matrix of a shape, the bfloat16 one first."""
    shape = parsed.rows, k
    draw = jax.jit(lambda seed: jax.random.normal(jax.random.key(seed), shape, BF16))
    sets = [(draw(seed), *operands) for seed, operands in enumerate(operand_sets(n, k)[:3])]
    found = {
        "matmul": lambda x, matrix, _, __: x @ matrix,
        "matmul, xla": lambda x, _, stored, __: x @ in_xla(stored).T,
        "matmul, dense": lambda x, _, stored, __: x @ stored.dense(),
        "matmul, dense, double": lambda x, _, __, twice: x @ twice.dense(),
    }
    options = {name: (function, CUBLAS_ONLY) for name, function in found.items()}
    compiled, failed = compile_all(options, sets)
    if failed:
        raise SystemExit(f"{n} x {k}: {failed}")
    timings = time_interleaved(
        compiled, sets, turns=parsed.turns, turn_ms=parsed.turn_ms, lead_ms=parsed.lead_ms
    )
    rows = []
    for name, timing in timings.items():
        added = timing.us - timings["matmul"].us
        row = {"n": n, "k": k, "rows": parsed.rows, "program": name, "us": round(timing.us, 2)}
        row |= {"ratio_matmul": round(timing.ratio, 4), "added_us": round(added, 2)}
        print(f"{n} x {k} {name:22s} {timing.us:8.2f} us {timing.ratio:.3f} of", end=" ")
        print(f"the matmul, {added:.2f} us more, {parsed.rows} rows", flush=True)
        rows.append(row)
    return rows


def main() -> None:
    """Measures every shape; fails at the end if a program failed or its values were wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--shapes", nargs="+", default=SHAPES, help="outputs × inputs, such as 4096x1024"
    )
    parser.add_argument("--levels", nargs="+", default=["shuffle", "permute"])
    parser.add_argument("--lines", nargs="+", type=int, default=[2, 4, 8, 16])
    parser.add_argument("--rows", type=int, default=8192, help="of the matmul; 0 for no matmuls")
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--turn-ms", type=float, default=15.0)
    parser.add_argument("--lead-ms", type=float, default=30.0)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parsed = parser.parse_args()
    if not runs_kernels():
        raise SystemExit(f"the kernel needs a Hopper GPU (H100, H200), and this is {device_kind()}")
    wrong = 0
    for shape in parsed.shapes:
        n, k = map(int, shape.split("x"))
        rows, problems = measure(n, k, parsed)
        if parsed.rows:
            rows += measure_matmuls(n, k, parsed)
        append_rows(parsed.out, [row | origin(parsed.commit) for row in rows])
        wrong += problems
    if wrong:
        raise SystemExit(f"{wrong} programs failed, or their values differ from XLA's: see above")


if __name__ == "__main__":
    main()
