"""Times whole training steps on random weights, variants interleaved, and prints their kernels.

    python -m scripts.bench.step --model llama-8b --batch 4 --seq 2048 --policies none \
        --kernels pallas xla --call h200-1 --commit abc1234 --out docs/measurements/step_h200.jsonl

Every variant is compiled for the same weights and the same tokens, rows without padding. Speed is
the median over the turns; the ratio is to the first variant within the same turn. Memory is what
the compiler planned (arguments, temporaries, results), and the allocator's peak: run it with
XLA_PYTHON_CLIENT_PREALLOCATE=false. The variants' first steps run from the smallest memory to the
largest, so that each peak is a variant's own.
"""

import argparse
import collections
import dataclasses
import glob
import json
import os
import random
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorax.adapters.nnx.apply import apply_lora, set_kernels
from lorax.config.adapter import LoraConfig
from lorax.config.train import TrainConfig
from lorax.devices.host_memory import HostArray, embedding_on_host
from lorax.devices.mesh import make_mesh
from lorax.devices.placement import place_batch
from lorax.models.architecture import DecoderConfig
from lorax.models.decoder import CausalLM
from lorax.models.families import read_architecture
from lorax.models.stack.recompute import REPEATING, Recomputation, check_policy
from lorax.system.hardware import memory_gib
from lorax.training.optim.optimizer import make_optimizer
from lorax.training.step import compile_lowered, make_train_step
from lorax.weights.dense import DENSE
from lorax.weights.format import Format
from lorax.weights.formats import FORMATS
from lorax_kernels import xla_options
from scripts.bench.rows import append_rows, origin
from scripts.make.random_checkpoint import SHAPES

BASES = {"bfloat16": DENSE} | {format.name: format for format in FORMATS if format is not DENSE}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run the step."""

    kernels: str
    recomputation: Recomputation
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Its name: kernels, recomputation and options."""
        options = [f"{k}={v}" for k, v in self.options]
        return " ".join([self.kernels, str(self.recomputation), *options])


@dataclasses.dataclass
class Compiled:
    """A compiled step, and the state it has come to."""

    step: Any
    frozen: Any
    state: Any
    compile_seconds: float
    peak_gib: float = 0.0

    @property
    def planned_gib(self) -> float:
        """Returns the memory that the compiler planned."""
        m = self.step.memory_analysis()
        held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
        return (held + m.temp_size_in_bytes) / 2**30

    @property
    def state_gib(self) -> float:
        """Returns what trains, and the optimizer's state."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.state)) / 2**30

    def run(self, batch, times: int = 1) -> float:
        """Runs some steps and returns the last loss."""
        metrics: Any = None
        for _ in range(times):
            self.state, metrics = self.step(self.state, self.frozen, batch)
        return float(metrics["loss"]) if times else float("nan")


def build_model(
    shape: str, r: int, offload_embedding: bool = False, format: Format = DENSE
) -> CausalLM:
    """Returns a model with random weights and adapters on all linear layers."""
    config = read_architecture(SHAPES[shape], shape)
    bf16 = jnp.bfloat16
    if format is DENSE:
        model = CausalLM(config, dtype=bf16, param_dtype=bf16, rngs=nnx.Rngs(0))
    else:
        model = build_quantised(config, format)
    settings = LoraConfig(r=r, lora_alpha=2.0 * r, target_modules="all-linear")
    if offload_embedding:
        embedding = model.model.embed_tokens.embedding
        embedding.set_value(np.asarray(embedding.get_value()).view(HostArray))  # type: ignore[arg-type]
    return apply_lora(model, settings, rngs=nnx.Rngs(1))


def build_quantised(config: DecoderConfig, format: Format) -> CausalLM:
    """Returns a model whose matrices are drawn and stored one at a time."""
    bf16 = jnp.dtype(jnp.bfloat16)
    model = nnx.eval_shape(lambda: CausalLM(config, dtype=bf16, param_dtype=bf16, rngs=nnx.Rngs(0)))
    draw = jax.jit(draw_matrix, static_argnames=("shape", "format"))
    graph, state = nnx.split(model)
    for index, (path, variable) in enumerate(nnx.to_flat_state(state)):
        shape = variable.get_value().shape
        if len(shape) == 1:
            variable.set_value(jnp.ones(shape, bf16) * (path[-1] != "bias"))
        else:
            held = format if path[-1] == "kernel" and path[0] != "lm_head" else DENSE
            variable.set_value(draw(jax.random.key(index), shape=shape, format=held))
    return nnx.merge(graph, state)


def draw_matrix(key: jax.Array, shape: tuple[int, int], format: Format):
    """Returns a normal matrix of deviation 0.02 in a format."""
    return format.store((0.02 * jax.random.normal(key, shape)).astype(jnp.bfloat16))


def read_policy(text: str) -> Recomputation:
    """Returns what ``full`` or ``full:6`` stands for."""
    policy, _, kept = text.partition(":")
    if kept and policy not in REPEATING:
        raise ValueError(f"{text}: {policy} recomputes no layer, so none can be kept")
    return Recomputation(check_policy(policy), int(kept or 1))


def draw_batch(vocabulary: int, accumulation: int, batch: int, seq: int) -> dict[str, Any]:
    """Returns micro-batches of random tokens, all supervised, in the host's memory."""
    tokens = np.random.default_rng(0).integers(0, vocabulary, (accumulation, batch, seq + 1))
    positions = np.broadcast_to(np.arange(seq, dtype=np.int32), (accumulation, batch, seq))
    return {
        "input_ids": tokens[..., :-1].astype(np.int32),
        "labels": tokens[..., 1:].astype(np.int32),
        "positions": positions,
    }


def compile_variant(model: CausalLM, variant: Variant, batch) -> Compiled:
    """Lowers here, so that the model's settings hold, and returns what compiles in a thread."""
    set_kernels(model, variant.kernels)  # type: ignore[arg-type]
    variant.recomputation.put_on(model)
    step, state = make_train_step(model, make_optimizer(TrainConfig(learning_rate=2e-4), 1_000_000))
    begin = time.perf_counter()
    lowered = step.compiled.lower(state, step.frozen, batch)
    options = {**(xla_options() or {}), **dict(variant.options)}
    compiled = compile_lowered(lowered, options)
    return Compiled(compiled, step.frozen, state, time.perf_counter() - begin)


def time_in_turns(
    variants: dict[str, Compiled], batch, turns: int, steps: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Returns name → seconds per step, a list over the turns."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    order = random.Random(0)
    states = sum(compiled.state_gib for compiled in variants.values())
    for compiled in sorted(variants.values(), key=lambda compiled: compiled.planned_gib):
        # A single variant may go without, to be timed from its very first step.
        compiled.run(batch, warmup or len(variants) > 1)
        # The allocator's peak only grows, so each is that of the largest so far: of this one. The
        # others' states are in memory too.
        compiled.peak_gib = memory_gib().gib - (states - compiled.state_gib)
    for _ in range(turns):
        for name in order.sample(list(variants), len(variants)):
            begin = time.perf_counter()
            variants[name].run(batch, steps)
            times[name].append((time.perf_counter() - begin) / steps)
    return times


def kernel_table(compiled: Compiled, batch, steps: int = 2) -> list[tuple[str, float, float]]:
    """Returns (kernel, calls per step, milliseconds per step), the longest first.

    The first row is the time in which no kernel ran, between the first one's begin and the last
    one's end.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            compiled.run(batch, steps)
        (file,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        planes = jax.profiler.ProfileData.from_file(file).planes
        lines = [line for plane in planes if "GPU:0" in plane.name for line in plane.lines]
        events = [e for line in lines if line.name.startswith("Stream") for e in line.events]
        total = collections.Counter()
        calls = collections.Counter()
        for event in events:
            total[event.name] += event.duration_ns / 1e6 / steps
            calls[event.name] += 1
    idle = 0.0
    until = min(event.start_ns for event in events)
    for event in sorted(events, key=lambda event: event.start_ns):
        idle += max(0.0, event.start_ns - until)
        until = max(until, event.start_ns + event.duration_ns)
    rows = [(name, calls[name] / steps, ms) for name, ms in total.most_common()]
    return [("(no kernel)", sum(calls.values()) / steps, idle / 1e6 / steps), *rows]


def main() -> None:
    """Measures one model, batch and length."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=list(SHAPES), default="llama-8b")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--base", choices=list(BASES), default="bfloat16")
    parser.add_argument(
        "--policies", nargs="+", default=["none"], help="as full, or full:6 with six layers kept"
    )
    parser.add_argument("--kernels", nargs="+", default=["pallas", "xla"])
    parser.add_argument(
        "--options", nargs="*", default=["{}"], help="JSON: XLA's, one variant each"
    )
    parser.add_argument("--offload-embedding", action="store_true", help="as in model's settings")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="per turn")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first turn")
    parser.add_argument("--profile", action="store_true", help="print each variant's kernels")
    parser.add_argument("--call", required=True, help="names this run on this machine")
    parser.add_argument("--commit", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parsed = parser.parse_args()
    variants = [
        Variant(kernels, read_policy(policy), tuple(json.loads(options).items()))
        for policy in parsed.policies
        for kernels in parsed.kernels
        for options in parsed.options
    ]
    model = build_model(parsed.model, parsed.r, parsed.offload_embedding, BASES[parsed.base])
    batch = draw_batch(model.config.vocab_size, parsed.accumulation, parsed.batch, parsed.seq)
    batch = place_batch(batch, make_mesh(), embedding_on_host(model))
    compiled: dict[str, Compiled] = {}
    with ThreadPoolExecutor(len(variants)) as pool:
        clones = [nnx.clone(model) for _ in variants]
        jobs = [
            pool.submit(compile_variant, *pair, batch)
            for pair in zip(clones, variants, strict=True)
        ]
        for variant, job in zip(variants, jobs, strict=True):
            try:
                compiled[variant.name] = job.result()
            except Exception as error:  # one that does not compile must not end the rest
                print(f"{variant.name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    del model, clones  # their adapters are not the states'
    times = time_in_turns(compiled, batch, parsed.turns, parsed.steps, parsed.warmup)
    first = next(iter(times.values()))
    tokens = parsed.accumulation * parsed.batch * parsed.seq
    for variant in variants:
        if variant.name not in times:
            continue
        series = times[variant.name]
        one = compiled[variant.name]
        row = {
            "call": parsed.call,
            "system": "lorax",
            "model": parsed.model,
            "base_dtype": parsed.base,
            "r": parsed.r,
            "batch": parsed.batch,
            "accumulation": parsed.accumulation,
            "seq": parsed.seq,
            "policy": variant.recomputation.policy,
            "kept_layers": variant.recomputation.kept_layers,
            "offload_embedding": parsed.offload_embedding,
            "kernels": variant.kernels,
            "options": dict(variant.options),
            "allocator": os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR", "default"),
            "tokens_per_s": round(tokens / statistics.median(series), 1),
            "step_ms": round(statistics.median(series) * 1e3, 2),
            "ratio": round(statistics.median(t / u for t, u in zip(series, first, strict=True)), 4),
            "planned_gib": round(one.planned_gib, 3),
            "peak_gib": round(one.peak_gib if parsed.warmup else memory_gib().gib, 3),
            "compile_s": round(one.compile_seconds, 1),
            **origin(parsed.commit),
        }
        append_rows(parsed.out, [row])
        print(
            f"{variant.name:40s} {row['tokens_per_s']:9.1f} tokens/s {row['step_ms']:8.2f} ms "
            f"ratio {row['ratio']:.4f} planned {row['planned_gib']:.2f} GiB "
            f"compiled in {row['compile_s']} s",
            flush=True,
        )
    if parsed.profile:
        for name, one in compiled.items():
            print(f"--- {name}")
            for kernel, calls, ms in kernel_table(one, batch)[:40]:
                print(f"{ms:9.3f} ms {calls:7.1f} x {kernel[:90]}")


if __name__ == "__main__":
    main()
