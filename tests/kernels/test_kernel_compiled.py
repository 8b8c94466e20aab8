"""Every kernel compiled ahead of time for the H200: nothing spills out of the registers.

The compiler comes from two wheels that must not be installed beside a CPU's JAX::

    pip install --target .aot --no-deps jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2
"""

import dataclasses
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SITE = Path(os.environ.get("LORAX_AOT_SITE", ROOT / ".aot"))
TARGET = Path(__file__).parent / "golden" / "h200_target_config.txtpb"
TABLE = ROOT / "kernels" / "lorax_kernels" / "tuned" / "nvidia_h200.json"
HARMLESS = {"C7519"}  # an instruction's register pairs could not be reused
ROWS, K, N = 8192, 4096, 4096

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),  # a guard against a hang
    pytest.mark.skipif(
        not (SITE / "jax_plugins").is_dir(),
        reason="needs JAX's CUDA plugin in the folder LORAX_AOT_SITE, or .aot: see this file",
    ),
]


def measured_products():
    """Returns every distinct (transposed, epilogue, config) of the table."""
    from lorax_kernels.lora_linear.plan import MatmulConfig

    rows = json.loads(TABLE.read_text())["matmul"] if TABLE.exists() else []
    found = {(r["transposed"], r["epilogue"], MatmulConfig(**r["config"])) for r in rows}
    defaults = (MatmulConfig(), MatmulConfig(stages=3))
    return sorted(found, key=repr) or [
        (transposed, "store", config) for transposed in (False, True) for config in defaults
    ]


def matmul_cases(shape):
    """Yields (name, function, operands) of every product that the op asks for."""
    import jax.numpy as jnp

    from lorax_kernels.lora_linear.kernel import grouped_matmul
    from lorax_kernels.lora_linear.plan import (
        Dropout,
        MatmulConfig,
        Term,
        Update,
        with_short_step,
    )

    x, w, h16, b16 = shape(ROWS, K), shape(K, N), shape(ROWS, 16), shape(16, N)
    h64, seed = shape(ROWS, 64), shape(3, dtype=jnp.uint32)

    def short(config, transposed, epilogue="store", drops=False):
        # Dropout is drawn in the backward pass alone.
        config = with_short_step(config)

        def run(x, w, h, b, seed):
            dropout = Dropout(seed, 0.1) if drops else None
            options = {"config": config, "transposed": transposed, "epilogue": epilogue}
            update = Update(h, b)
            return grouped_matmul([[Term(x, (w,))]], update=update, dropout=dropout, **options)

        return run, (x, w, h16, b16, seed)

    def gated(config, epilogue, rank=64):
        def run(x, gate, up, h, b, d_act):
            terms = [Term(x, (gate, up)), Term(h, (b, b), rank, columns=(0, N))]
            tail = [d_act] if epilogue == "swiglu_grad" else []
            return grouped_matmul([terms], config=config, epilogue=epilogue, tail=tail)

        return run, (x, w, w, shape(ROWS, rank), shape(rank, 2 * N), shape(ROWS, N))

    def gated_back(config, rank, drops):
        def run(dy, w, g, a, seed, gate, up):
            dropout = Dropout(seed, 0.1) if drops else None
            terms, update = [Term(dy, (w,))], Update(g, a.T) if rank == 16 else None
            if update is None:
                terms.append(Term(g, (a,)))
            options = {"transposed": True, "epilogue": "swiglu_back", "dropout": dropout}
            return grouped_matmul([terms], config=config, update=update, tail=[gate, up], **options)

        rows, g, a = shape(ROWS, N), shape(ROWS, rank), shape(N, rank)
        return run, (x, w, g, a, seed, rows, rows)

    def grouped(config):
        def run(x, w, h, b, bias):
            groups = [[Term(x, (w,)), Term(h, (b,), 64, 0, 0, (i * N,))] for i in range(2)]
            return grouped_matmul(groups, config=config, bias=bias)

        return run, (x, w, h64, shape(64, 2 * N), shape(2 * N, dtype=jnp.float32))

    def appended(config, rank, drops, transposed=True, width=0):
        def run(dy, w, g, a, seed, y):
            dropout = Dropout(seed, 0.1) if drops else None
            options = {"config": config, "transposed": transposed, "dropout": dropout}
            terms = [Term(dy, (w,)), Term(g, (a,))]
            return grouped_matmul([terms], begun=([y], width) if width else None, **options)

        a = shape(N, rank) if transposed else shape(rank, N)
        return run, (x, w, shape(ROWS, rank), a, seed, shape(ROWS, N))

    def added(config):
        def run(x, w, h, b, y):
            return grouped_matmul(
                [[Term(x, (w,))]], config=config, epilogue="add", tail=[y], update=Update(h, b)
            )

        return run, (x, w, h16, b16, shape(ROWS, N))

    seen = set()
    for transposed, epilogue, config in measured_products():
        name = f"{'nt' if transposed else 'nn'} {epilogue} {config}"
        if epilogue == "add":
            yield name, *added(config)
            continue
        if epilogue == "swiglu_back":
            yield name, *gated_back(with_short_step(config), 16, drops=False)
            continue
        if epilogue != "store":
            yield name, *gated(config, epilogue)
            continue
        yield f"short step, {name}", *short(config, transposed)
        # The order of the tiles changes no registers worth compiling it all again for.
        ordered = dataclasses.replace(config, raster_minor=1, raster_width=8)
        if (transposed, ordered) not in seen:
            seen.add((transposed, ordered))
            case = appended(ordered, 64, False, transposed, width=512)
            yield f"appended rank 64, continued, {name}", *case
        if not transposed:
            yield f"added, {name}", *added(config)
        if transposed:
            yield f"dropped short step, {name}", *short(config, transposed, drops=True)
        elif config.cluster == 1:
            yield f"groups and bias, {name}", *grouped(config)
    default = MatmulConfig()
    for epilogue in ("swiglu", "swiglu_keep", "swiglu_grad"):
        yield f"{epilogue} {default}", *gated(default, epilogue)
    yield f"swiglu_keep, rank 32, {default}", *gated(default, "swiglu_keep", 32)
    for rank, drops in ((16, False), (16, True), (32, False), (64, False)):
        config = dataclasses.replace(default, stages=3) if rank == 16 else default
        name = f"swiglu_back, rank {rank}, {'dropped, ' if drops else ''}{config}"
        yield name, *gated_back(config, rank, drops)
    yield f"groups and bias, {default}", *grouped(default)
    yield f"appended rank 64, {default}", *appended(default, 64, drops=False)
    for transposed in (False, True):
        name = f"appended rank 32, continued, {'nt' if transposed else 'nn'} {default}"
        yield name, *appended(default, 32, False, transposed, width=512)
    for rank in (32, 64, 128, 192):
        yield f"dropped rank {rank}, {default}", *appended(default, rank, drops=True)


def factor_cases(shape):
    """Yields a case of every epilogue with factors, at the tiles of one of Llama-8B's layers."""
    import jax
    import jax.numpy as jnp

    from lorax_kernels import LoraWeights, lora_linear_group, lora_mlp, lora_swiglu

    def member(k, n, r):
        vectors = {name: shape(n, dtype=jnp.float32) for name in ("factor", "bias")}
        narrow = {"a": shape(k, r, dtype=jnp.float32), "b": shape(r, n, dtype=jnp.float32)}
        return {"w": shape(k, n), **narrow, **vectors}

    def differentiated(function):
        def run(x, members):
            own = lambda x, members: function(x, [LoraWeights(**m) for m in members])
            y, pull = jax.vjp(own, x, members)
            return y, pull(y)

        return run

    def group(x, members):
        return lora_linear_group(x, members, kernels="pallas")

    def mlp(x, members, **dropout):
        return lora_mlp(x, *members, residual=x, kernels="pallas", **dropout)

    def dropped(x, members):
        keys = (jax.random.key(0), jax.random.key(1))
        return mlp(x, members, dropout_rate=0.1, dropout_keys=keys)

    def swiglu(x, members):
        return lora_swiglu(x, *members, kernels="pallas", recompute=True)

    x = shape(ROWS, K)
    for r in (16, 32, 64):
        wide = [{**member(K, 14336, r), "bias": None} for _ in range(2)]
        members = [member(K, 4096, r), member(K, 1024, r)]
        yield f"group, rank {r}", differentiated(group), (x, members)
        whole = [*wide, member(14336, K, r)]
        yield f"mlp, rank {r}", differentiated(mlp), (x, whole)
        if r == 16:
            yield f"mlp, rank {r}, dropped", differentiated(dropped), (x, whole)
    yield "swiglu, recomputed", differentiated(swiglu), (x, wide)


def inline_cases(shape):
    from lorax_kernels.lora_linear.inline import InlineTerm, inline_matmul
    from lorax_kernels.tuning import inline_config

    def case(r, transposed, adds=False):
        def run(x, w, u, b, y):
            config, terms = inline_config(r), [InlineTerm(x, w, u)]
            options = {"transposed": transposed, "residual": y if adds else None}
            return inline_matmul(terms, b, n=N, width=512, config=config, **options)

        return run, (shape(ROWS, K), shape(K, N), shape(r, K), shape(r, N), shape(ROWS, N))

    for r, transposed in itertools.product((16, 32, 64), (False, True)):
        yield f"rank {r} {'nt' if transposed else 'nn'}", *case(r, transposed)
    for r in (16, 32):
        yield f"rank {r} nn, added", *case(r, False, adds=True)


def project_cases(shape):
    import jax.numpy as jnp

    from lorax_kernels.lora_linear.plan import Dropout
    from lorax_kernels.lora_linear.project import project
    from lorax_kernels.tuning import project_config

    def case(m, r, drops):
        def run(t, u, seed):
            mask = Dropout(seed, 0.1) if drops else None
            return project(t, u, config=project_config(m, K, r), mask=mask)

        return run, (shape(m, K), shape(r, K), shape(3, dtype=jnp.uint32))

    ranks, dropped = (16, 32, 64, 128, 256), (16, 32, 64, 256)
    for r, drops in (*((r, False) for r in ranks), *((r, True) for r in dropped)):
        yield f"rank {r}{', dropped' if drops else ''}", *case(ROWS, r, drops)
    yield "rank 16 in parts", *case(512, 16, False)


def gradient_cases(shape):
    import jax.numpy as jnp

    from lorax_kernels.lora_linear.gradient import gradient
    from lorax_kernels.lora_linear.plan import Dropout
    from lorax_kernels.tuning import gradient_config

    def case(c, r, u_rank, drops):
        def run(t, v, u, seed):
            config = gradient_config(ROWS, c, r, u_rank)
            mask = Dropout(seed, 0.1) if drops else None
            return gradient(t, v, u if u_rank else None, config=config, mask=mask)

        operands = shape(ROWS, c), shape(ROWS, r), shape(16, c), shape(3, dtype=jnp.uint32)
        return run, operands

    seen = set()
    for c, r, (u_rank, drops) in itertools.product(
        (1024, 14336), (16, 32, 64, 128, 256), ((0, False), (16, False), (0, True))
    ):
        config = gradient_config(ROWS, c, r, u_rank)
        if (config, r, u_rank, drops) in seen or (drops and c != 1024):
            continue
        seen.add((config, r, u_rank, drops))
        kind = ", both" if u_rank else ", dropped" if drops else ""
        yield f"rank {r}, {c} columns{kind}", *case(c, r, u_rank, drops)


def nf4_cases(shape):
    import jax.numpy as jnp

    from lorax_kernels.weights.nf4.kernel import Variant, dequantise

    codes = shape(K, N // 2, dtype=jnp.uint8)
    single = shape(K // 64, N, dtype=jnp.float32), None
    groups = shape(K // 64 * N // 256, dtype=jnp.float32)
    double = shape(K // 64, N, dtype=jnp.uint8), (groups, shape(dtype=jnp.float32))
    for rows, (name, scales) in itertools.product((8, 16), {"": single, "double": double}.items()):
        for dtype in map(jnp.dtype, ("bfloat16", "float16")):
            function = functools.partial(dequantise, dtype=dtype, _variant=Variant(rows))
            yield f"{rows} rows, {dtype} {name}", function, (codes, *scales)


CASES = {
    "matmul": matmul_cases,
    "factor": factor_cases,
    "inline": inline_cases,
    "project": project_cases,
    "gradient": gradient_cases,
    "nf4": nf4_cases,
}


PARTS = [*(("matmul", part, 3) for part in range(3)), *((kind, 0, 1) for kind in [*CASES][1:])]
"""Of which kind every how many cases, from which on: several processes share the largest."""


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part[0]}-{part[1]}")
def test_no_kernel_spills(part):
    rows = run_apart(*part)
    assert len(rows) >= 4
    assert not [row for row in rows if row["problems"]]


def test_kernels_compiled_ahead_are_there_when_the_program_around_them_is_compiled():
    (row,) = run_apart("ahead")
    assert row["kernels"] == 2
    assert (row["compiled_ahead"], row["compiled_then"]) == (2, 0)


def run_apart(kind, part=0, parts=1):
    """Returns what this file, run as a program where there is a compiler, prints."""
    paths = [str(SITE), str(ROOT / "kernels")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, __file__, kind, str(part), str(parts)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for row in rows:
        print(row)
    return rows


def assemble(compile_them):
    """Returns what `compile_them` does, and what the assembler said, which it prints."""
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"  # and not all that can be dumped, which takes longer
    terminal = os.dup(1)
    with tempfile.TemporaryFile("w+") as said:
        os.dup2(said.fileno(), 1)
        try:
            result = compile_them()
        finally:
            os.dup2(terminal, 1)
            os.close(terminal)
        said.seek(0)
        return result, said.read()


def count_kernels(said):
    return said.count("Compiling entry function")


def find_problems(said):
    """Reads what the assembler said about every kernel."""
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", said)
    codes = set(re.findall(r"\(([CW]\d+)\)", said)) - HARMLESS
    problems = [] if count_kernels(said) else ["the assembler reported nothing"]
    if len(frames) != count_kernels(said):
        problems.append(f"{count_kernels(said)} kernels, {len(frames)} register reports")
    problems += [f"stack, stores, loads {f}" for f in frames if any(map(int, f))]
    return problems + sorted(codes)


def compile_ahead(shape, whole):
    """Returns how many kernels of a program are compiled by `compile_kernels`, and after it."""
    import jax
    import jax.numpy as jnp

    from lorax_kernels import compile_kernels, lora_linear

    operands = shape(ROWS, K), shape(K, N), shape(K, 16, dtype=jnp.float32)
    function = lambda x, w, a, b: lora_linear(x, w, a, b, scale=1.0, kernels="pallas")
    lowered = jax.jit(function).lower(*operands, shape(16, N, dtype=jnp.float32))

    kernels, ahead = assemble(lambda: compile_kernels(whole))
    _, then = assemble(lowered.compile)
    counts = {"compiled_ahead": count_kernels(ahead), "compiled_then": count_kernels(then)}
    return {"kernels": kernels, **counts}


def main(kind, part, parts):
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text(), topology="1x1x1"
    )
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    h200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=whole)

    abstract = jax.sharding.AbstractMesh((), (), abstract_device=h200)
    if kind == "ahead":
        with jax.sharding.use_abstract_mesh(abstract):
            print(json.dumps(compile_ahead(shape, whole)), flush=True)
        return
    with jax.sharding.use_abstract_mesh(abstract):
        cases = list(CASES[kind](shape))[int(part) :: int(parts)]
    for name, function, operands in cases:
        begun = time.time()
        with jax.sharding.use_abstract_mesh(abstract):
            lowered = jax.jit(function).lower(*operands)
        problems = find_problems(assemble(lowered.compile)[1])
        seconds = round(time.time() - begun, 1)
        row = {"kind": kind, "case": name, "seconds": seconds, "problems": problems}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
