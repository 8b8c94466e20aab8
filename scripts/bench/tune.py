"""Finds the fastest tiles for the matmuls of real models and writes the table that lorax reads.

    python -m scripts.bench.tune --commit abc1234                          # on the GPU, minutes
    python -m scripts.bench.tune --adopt docs/measurements/kernels_h200.jsonl   # anywhere

The first form times every candidate interleaved with cuBLAS, each at the clock that the chip's
power limit leaves it, and writes the matmuls' rows of
``kernels/lorax_kernels/tuned/<device>.json``; rows of other matmuls stay. Where an epilogue
overwrites its operands, copies that save them are timed with it; cuBLAS computes the matmuls alone.
The second form copies in a benchmark's times of the whole operation and of XLA's: ``kernels: auto``
runs the kernel where it was the faster one.
"""

import argparse
import datetime
import json
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from lorax_kernels.device import CUBLAS_ONLY
from lorax_kernels.lora_linear.choice import padded_rank
from lorax_kernels.lora_linear.kernel import grouped_matmul
from lorax_kernels.lora_linear.plan import EPILOGUE_ARRAYS, Epilogue, MatmulConfig, Term, Update
from lorax_kernels.timing import compile_all, time_interleaved
from lorax_kernels.tuning import TUNED
from lorax_kernels.workloads import SIZES, Workload, draw, model_workloads

RANK = 16
SWIGLU: tuple[Epilogue, ...] = ("swiglu", "swiglu_keep")
EPILOGUES: tuple[Epilogue, ...] = ("store", "add", "swiglu", "swiglu_keep", "swiglu_back")
CANDIDATES = [
    MatmulConfig(stages=3),
    MatmulConfig(stages=3, raster_minor=0, raster_width=16),
    MatmulConfig(stages=3, raster_minor=0, raster_width=12),
    MatmulConfig(stages=3, raster_minor=0),
    MatmulConfig(stages=3, cluster=2),
    MatmulConfig(stages=3, cluster=2, raster_width=4),
    MatmulConfig(stages=3, store_slots=4, raster_minor=0, raster_width=16),
    MatmulConfig(store_slots=1, raster_minor=0, raster_width=16),
]
SWIGLU_CANDIDATES = [
    MatmulConfig(),
    MatmulConfig(raster_minor=0),
    MatmulConfig(raster_minor=0, raster_width=10),
    MatmulConfig(raster_minor=0, raster_width=12),
    MatmulConfig(raster_minor=0, cluster=2),
    MatmulConfig(raster_minor=0, cluster=2, raster_width=5),
]


def operand_sets(workload: Workload, m: int, transposed: bool, epilogue: Epilogue, count: int = 3):
    """Returns operands of the matmul with the update's step, each set its own."""
    make = jax.jit(draw, static_argnums=(1, 2))
    r = padded_rank(RANK * len(workload.ns))
    reads, _ = EPILOGUE_ARRAYS[epilogue]
    sets = []
    for i in range(count):
        weights = [make(i + 10 * j, (workload.k, n), 0.02) for j, n in enumerate(workload.ns)]
        if transposed:
            wide = [make(100 + i + 10 * j, (m, n), 1.0) for j, n in enumerate(workload.ns)]
            narrow = make(300 + i, (r, workload.k), 0.1)
        else:
            wide = [make(100 + i, (m, workload.k), 1.0)]
            narrow = make(300 + i, (r, sum(workload.ns)), 0.1)
        width = workload.k if transposed else workload.ns[0]
        tail = [make(400 + i + 10 * j, (m, width), 1.0) for j in range(reads)]
        sets.append((wide, weights, make(200 + i, (m, r), 1.0), narrow, tail))
    return sets


def programs_of(workload: Workload, transposed: bool, epilogue: Epilogue):
    """Returns cuBLAS and every candidate as name → (function, options)."""

    def base(wide, weights, h, narrow, tail):
        if transposed:
            return [dy @ w.T for dy, w in zip(wide, weights, strict=True)]
        y = [wide[0] @ w for w in weights]
        return jax.nn.silu(y[0]) * y[1] if epilogue == "swiglu" else y

    def candidate(config):
        def run(wide, weights, h, narrow, tail):
            update = Update(h, narrow) if narrow.shape[0] == RANK else None
            options = {"config": config, "transposed": transposed, "epilogue": epilogue}
            options["tail"] = tail
            if transposed:
                terms = [Term(dy, (w,)) for dy, w in zip(wide, weights, strict=True)]
                groups = [terms if update else [*terms, Term(h, (narrow.T,))]]
                return grouped_matmul(groups, update=update, **options)
            columns = [sum(workload.ns[:j]) for j in range(len(workload.ns))]
            if epilogue in SWIGLU:
                b = Term(h, (narrow, narrow), narrow.shape[0], columns=tuple(columns))
                return grouped_matmul([[Term(wide[0], tuple(weights)), b]], **options)
            groups = [[Term(wide[0], (w,))] for w in weights]
            if update is None:
                for terms, column in zip(groups, columns, strict=True):
                    terms.append(Term(h, (narrow,), narrow.shape[0], columns=(column,)))
            return grouped_matmul(groups, update=update, **options)

        return run

    candidates = SWIGLU_CANDIDATES if epilogue in SWIGLU else CANDIDATES
    if epilogue == "swiglu_back":
        candidates = [config for config in candidates if config.store_slots == 2]
    named = {json.dumps(changed(c)): (candidate(c), None) for c in candidates}
    return {"cublas": (base, CUBLAS_ONLY), **named}


def changed(config: MatmulConfig) -> dict[str, int]:
    """Returns what differs from the default."""
    default = vars(MatmulConfig())
    return {name: value for name, value in vars(config).items() if value != default[name]}


def products(workload: Workload) -> Iterator[tuple[bool, Epilogue]]:
    """Yields (transposed, epilogue) of the matmuls of a layer."""
    if workload.swiglu:
        for epilogue in SWIGLU:
            yield False, epilogue
        return
    yield False, "store"
    yield True, "store"
    _, _, layer = workload.name.partition("/")
    if layer in ("o_proj", "down_proj"):
        yield False, "add"
    if layer == "down_proj":
        yield True, "swiglu_back"


def tune(models: list[str], rows: list[int], layers: list[str], epilogues: list[str], seconds):
    """Returns one row per matmul: the fastest tiles and their time."""
    begin = time.monotonic()
    found = []
    seen = set()
    for m in rows:
        for model in models:
            for workload in model_workloads(model):
                if layers and workload.name.partition("/")[2] not in layers:
                    continue
                for transposed, epilogue in products(workload):
                    key = (m, workload.k, workload.ns, transposed, epilogue)
                    if key in seen or epilogue not in epilogues:
                        continue
                    if time.monotonic() - begin > seconds:
                        print(f"out of time before {workload.name} m {m}", flush=True)
                        return found
                    seen.add(key)
                    found.append(tune_one(workload, m, transposed, epilogue))
    return found


def tune_one(workload: Workload, m: int, transposed: bool, epilogue: Epilogue) -> dict:
    """Times all candidates for one matmul."""
    sets = operand_sets(workload, m, transposed, epilogue)
    compiled, failed = compile_all(programs_of(workload, transposed, epilogue), sets)
    timings = time_interleaved(compiled, sets, turns=3, turn_ms=350.0, lead_ms=150.0)
    best = min((name for name in timings if name != "cublas"), key=lambda n: timings[n].ratio)
    ratios = {name: round(t.ratio, 4) for name, t in timings.items()}
    direction = "nt" if transposed else "nn"
    print(
        f"{workload.name:28s} m {m:6d} {direction} {epilogue:7s} {ratios} {failed or ''}",
        flush=True,
    )
    k = workload.k
    n = sum(workload.ns)
    return {
        "transposed": transposed,
        "epilogue": epilogue,
        "m": m,
        "k": n if transposed else k,
        "n": k if transposed else n,
        "config": json.loads(best),
        "ratio": round(timings[best].ratio, 4),
        "ratios": ratios,
        **({"failed": sorted(failed)} if failed else {}),
    }


def merge(old: list[dict], new: list[dict]) -> list[dict]:
    """Returns the old rows with those of the same matmul replaced, and then the others."""

    def key(row):
        return tuple(row[name] for name in ("transposed", "epilogue", "m", "k", "n"))

    found = {key(row): row for row in new}
    kept = [found.pop(key(row), row) for row in old]
    return kept + list(found.values())


def adopt(table: dict, benchmark: Path) -> None:
    """Copies in what a benchmark found about the whole operation, forward and backward."""
    rows = [json.loads(line) for line in benchmark.read_text(encoding="utf-8").splitlines()]
    table["linear"] = [
        {name: row[name] for name in ("workload", "m", "k", "n", "r", "ours_us", "xla_us")}
        for row in rows
        if row["what"] == "fwd_bwd" and not row["dropout"] and "swiglu" not in row["workload"]
    ]


def main() -> None:
    """Writes the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rows", nargs="+", type=int, default=[8192, 2048, 16384])
    parser.add_argument("--epilogues", nargs="+", choices=EPILOGUES, default=list(EPILOGUES))
    parser.add_argument(
        "--layers", nargs="+", default=[], help="as qkv or o_proj; all if not given"
    )
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin nothing after this")
    parser.add_argument("--commit", default="")
    parser.add_argument("--adopt", type=Path, help="a benchmark's rows; times nothing")
    parser.add_argument("--out", type=Path, default=TUNED / "nvidia_h200.json")
    parsed = parser.parse_args()
    table: dict = {"matmul": [], "linear": []}
    if parsed.out.exists():
        table = json.loads(parsed.out.read_text(encoding="utf-8"))
    if parsed.adopt:
        adopt(table, parsed.adopt)
    else:
        options = parsed.layers, parsed.epilogues, parsed.seconds
        found = tune(parsed.models, parsed.rows, *options)
        origin = {"jax": jax.__version__, "commit": parsed.commit}
        origin["date"] = datetime.date.today().isoformat()
        table["matmul"] = merge(table["matmul"], [row | origin for row in found])
        table["device"] = jax.devices()[0].device_kind
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    rows = {name: value for name, value in table.items() if name not in ("matmul", "linear")}
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in rows.items()]
    for name in ("matmul", "linear"):
        body = ",\n".join(f"    {json.dumps(row)}" for row in table[name])
        lines.append(f'  "{name}": [\n{body}\n  ]' + ("," if name == "matmul" else ""))
    parsed.out.write_text("{\n" + "\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"wrote {parsed.out}")


if __name__ == "__main__":
    main()
