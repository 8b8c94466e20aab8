"""Measures the dequantisation of NF4 matrices, and appends one row per program and shape.

    python -m scripts.bench.nf4 --commit abc1234 --out docs/measurements/nf4_h200.jsonl

Interleaved within one process: a copy in bfloat16, XLA, and the kernel's variants, each with and
without double quantisation. The bytes of a program are those that it must read and write. Every
program's values are compared with XLA's, bit by bit, before the timing. Then matmuls of `--rows`
rows: one with the bfloat16 matrix, and those that dequantise the matrix first.
"""

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path

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


def programs(rows: list[int]) -> dict[str, Program]:
    """Returns the programs by name, the copy first."""
    single = 2 + 1 / 2 + 4 / 64
    double = 2 + 1 / 2 + 1 / 64
    found = {
        "copy": Program(lambda matrix, _, __: -matrix, 4),
        "xla": Program(lambda _, stored, __: in_xla(stored), single),
        "xla, double": Program(lambda _, __, twice: in_xla(twice), double),
    }
    for each in rows:
        kernel = functools.partial(in_kernel, each)
        found[f"{each} rows"] = Program(lambda _, w, __, kernel=kernel: kernel(w), single)
        found[f"{each} rows, double"] = Program(lambda _, __, w, kernel=kernel: kernel(w), double)
    return found


def in_xla(stored: Nf4) -> jax.Array:
    """Returns the matrix, dequantised by XLA: the kernel has no float32."""
    return stored.dense(jnp.float32).astype(BF16)


def in_kernel(rows: int, stored: Nf4) -> jax.Array:
    """Returns the matrix, dequantised by a variant of the kernel."""
    from lorax_kernels.weights.nf4.kernel import Variant, dequantise

    nested = None
    if stored.nested_absmax is not None and stored.offset is not None:
        nested = stored.nested_absmax, stored.offset
    return dequantise(stored.codes, stored.absmax, nested, BF16, Variant(rows))


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
    return int(count_unequal(result, jax.jit(in_xla)(twice if "double" in name else stored)))


def measure(n: int, k: int, parsed: argparse.Namespace) -> tuple[list[dict], int]:
    """Returns the rows of a shape, and the number of programs that failed or were wrong."""
    sets = operand_sets(n, k)
    found = programs(parsed.tile_rows)
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
        "matmul, xla": lambda x, _, stored, __: x @ in_xla(stored),
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
    parser.add_argument("--tile-rows", nargs="+", type=int, default=[8, 16], help="per thread")
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
