"""Times training steps that differ in what is adapted, interleaved, and appends rows.

    python -m scripts.bench.adapted methods --call h200-1 --commit abc1234 \
        --out docs/measurements/adapted_h200.jsonl

- ``methods``: LoRA at 8B; DoRA; LoRA on the embedding and the head too.
- ``bias``: Qwen2.5-7B without the biases of q, k and v; with them.
- ``blocks``: transformer blocks at 8B's width in NNX; the same in Linen.

Each variant has random weights and reads the same tokens, rows without padding. Speed is the median
over the turns; the ratio is the median of the variant's speed to the first one's in the same turn.
Memory is what the compiler planned. Run it with XLA_PYTHON_CLIENT_MEM_FRACTION=0.93, so that the
allocator begins with one region that all variants fit.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx

import lorax.linen
from lorax.adapters.nnx.apply import apply_lora, set_kernels
from lorax.config.adapter import LoraConfig
from lorax.config.train import TrainConfig
from lorax.devices.mesh import make_mesh
from lorax.devices.placement import place_batch
from lorax.models.decoder import CausalLM
from lorax.models.families import read_architecture
from lorax.models.stack.recompute import Recomputation
from lorax.training.optim.optimizer import make_optimizer
from lorax.training.step import compile_lowered, make_train_step
from lorax_kernels import xla_options
from scripts.bench.rows import append_rows, origin
from scripts.bench.step import Compiled, draw_batch, kernel_table, time_in_turns
from scripts.make.random_checkpoint import SHAPES

BF16 = jnp.dtype(jnp.bfloat16)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WIDTH = 4096
HEADS = 32
INNER = 14336

type Made = tuple[Any, Any]  # a step and its state


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Variants by name, the first of which is the one to compare with, and their batch.

    Attributes:
        model: Name of the model.
        make: Name → function that returns a step and its state.
        batch: Placed on the device.
        tokens: Number of tokens in a batch.
    """

    model: str
    make: dict[str, Callable[[], Made]]
    batch: Any
    tokens: int


def make_base(shape: str, **changes: Any) -> CausalLM:
    """Returns a language model with random weights."""
    config = dataclasses.replace(read_architecture(SHAPES[shape], shape), **changes)
    return CausalLM(config, dtype=BF16, param_dtype=BF16, rngs=nnx.Rngs(0))


def step_of(base: CausalLM, kernels: Any, settings: dict[str, Any]) -> Made:
    """Returns the step of a language model with adapters, and its state."""
    config = LoraConfig(**{"target_modules": "all-linear", **settings})
    model = apply_lora(base, config, rngs=nnx.Rngs(1))
    set_kernels(model, kernels)
    Recomputation("none", 1).put_on(model)
    return make_train_step(model, make_optimizer(TrainConfig(learning_rate=2e-4), 1_000_000))


def language_models(parsed: argparse.Namespace, shape: str, variants) -> Comparison:
    """Returns a comparison of language models: name → base, kernels, LoRA's settings."""
    rank = {"r": parsed.r, "lora_alpha": 2.0 * parsed.r}
    make: dict[str, Callable[[], Made]] = {}
    for name, (base, kernels, settings) in variants.items():
        make[name] = functools.partial(step_of, base, kernels, rank | settings)
    vocabulary = next(iter(variants.values()))[0].config.vocab_size
    batch = place_batch(draw_batch(vocabulary, 1, parsed.batch, parsed.seq), make_mesh())
    return Comparison(shape, make, batch, parsed.batch * parsed.seq)


def compare_methods(parsed: argparse.Namespace) -> Comparison:
    """Returns LoRA, DoRA, and LoRA on the embedding and the head."""
    shape = parsed.model or "llama-8b"
    base = make_base(shape)
    tables = {"target_modules": [*LINEAR, "embed_tokens", "lm_head"]}
    kernels = parsed.kernels[0]
    variants = {
        "lora": (base, kernels, {}),
        "dora": (base, kernels, {"use_dora": True}),
        "lora, embedding and head": (base, kernels, tables),
    }
    return language_models(parsed, shape, variants)


def compare_bias(parsed: argparse.Namespace) -> Comparison:
    """Returns Qwen2.5 without biases of q, k and v, and with them."""
    shape = parsed.model or "qwen2.5-7b"
    bare = make_base(shape, qkv_bias=False)
    biased = make_base(shape)
    variants = {}
    for kernels in parsed.kernels:
        variants[f"no bias, {kernels}"] = (bare, kernels, {})
        variants[f"bias on q, k and v, {kernels}"] = (biased, kernels, {})
    return language_models(parsed, shape, variants)


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Returns causal attention of (batch, tokens, width), in heads."""
    heads = [u.reshape(*u.shape[:2], HEADS, -1) for u in (q, k, v)]
    return jax.nn.dot_product_attention(*heads, is_causal=True).reshape(q.shape)


class LinenBlock(linen.Module):
    """A transformer block of Linen's layers."""

    width: int = WIDTH
    inner: int = INNER

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns attention and a SwiGLU added to `x`."""

        def dense(width, name):
            return linen.Dense(width, use_bias=False, dtype=BF16, param_dtype=BF16, name=name)

        y = linen.RMSNorm(dtype=BF16, param_dtype=BF16)(x)
        y = attend(*(dense(self.width, name)(y) for name in ("query", "key", "value")))
        x += dense(self.width, "out")(y)
        y = linen.RMSNorm(dtype=BF16, param_dtype=BF16)(x)
        gate = linen.silu(dense(self.inner, "gate")(y))
        return x + dense(self.width, "down")(gate * dense(self.inner, "up")(y))


class NnxBlock(nnx.Module):
    """The same block of NNX's layers."""

    def __init__(self, width: int = WIDTH, inner: int = INNER, *, rngs: nnx.Rngs):
        def dense(k, n):
            return nnx.Linear(k, n, use_bias=False, dtype=BF16, param_dtype=BF16, rngs=rngs)

        def norm():
            return nnx.RMSNorm(width, dtype=BF16, param_dtype=BF16, rngs=rngs)

        self.norms = nnx.List([norm(), norm()])
        self.query = dense(width, width)
        self.key = dense(width, width)
        self.value = dense(width, width)
        self.out = dense(width, width)
        self.gate = dense(width, inner)
        self.up = dense(width, inner)
        self.down = dense(inner, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns attention and a SwiGLU added to `x`."""
        y = self.norms[0](x)
        x += self.out(attend(self.query(y), self.key(y), self.value(y)))
        y = self.norms[1](x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class LinenBlocks(linen.Module):
    """Blocks in a row."""

    blocks: int

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the last block's output."""
        for _ in range(self.blocks):
            x = LinenBlock()(x)
        return x


class NnxBlocks(nnx.Module):
    """Blocks in a row."""

    def __init__(self, blocks: int, *, rngs: nnx.Rngs):
        self.blocks = nnx.List([NnxBlock(rngs=rngs) for _ in range(blocks)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the last block's output."""
        for block in self.blocks:
            x = block(x)
        return x


def square_loss(model: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of the output's squares, and how many there are."""
    y = model(batch["x"]).astype(jnp.float32)
    return jnp.square(y).sum(), jnp.float32(y.size)


def compare_blocks(parsed: argparse.Namespace) -> Comparison:
    """Returns blocks of NNX, and those of Linen."""
    config = LoraConfig(r=parsed.r, lora_alpha=2.0 * parsed.r, target_modules="all-linear")
    shape = (1, parsed.batch, parsed.seq, WIDTH)
    optimizer = optax.adamw(1e-4)
    kernels = parsed.kernels[0]

    def of_nnx() -> Made:
        model = apply_lora(NnxBlocks(parsed.blocks, rngs=nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
        set_kernels(model, kernels)
        return make_train_step(model, optimizer, square_loss)

    def of_linen() -> Made:
        model = LinenBlocks(parsed.blocks)
        example = jax.ShapeDtypeStruct(shape[1:], BF16)
        variables = jax.jit(lambda key: model.init(key, jnp.zeros(shape[1:], BF16)))(
            jax.random.key(0)
        )
        adapted, variables = lorax.linen.apply_lora(model, variables, config, example, rngs=1)
        adapted = adapted.with_kernels(kernels)
        return lorax.linen.make_train_step(adapted, variables, optimizer, square_loss)

    batch = {"x": jax.random.normal(jax.random.key(2), shape, BF16)}
    make = {"nnx": of_nnx, "linen": of_linen}
    return Comparison(f"{parsed.blocks} blocks", make, batch, parsed.batch * parsed.seq)


COMPARISONS = {"methods": compare_methods, "bias": compare_bias, "blocks": compare_blocks}


def compile_all(comparison: Comparison) -> dict[str, Compiled]:
    """Returns the variants, traced one after another and compiled side by side."""

    def compile_one(lowered):
        begin = time.perf_counter()
        return compile_lowered(lowered, dict(xla_options() or {})), time.perf_counter() - begin

    with ThreadPoolExecutor() as pool:
        jobs = {}
        for name, make in comparison.make.items():
            step, state = make()
            lowered = step.compiled.lower(state, step.frozen, comparison.batch)
            jobs[name] = step.frozen, state, pool.submit(compile_one, lowered)
        compiled: dict[str, Compiled] = {}
        for name, (frozen, state, job) in jobs.items():
            program, seconds = job.result()
            compiled[name] = Compiled(program, frozen, state, seconds)
    return compiled


def rows_of(
    comparison: Comparison,
    compiled: dict[str, Compiled],
    times: dict[str, list[float]],
    parsed: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Returns a row for every variant."""
    first = next(iter(times.values()))
    rows = []
    for name, series in times.items():
        one = compiled[name]
        ratios = [base / own for base, own in zip(first, series, strict=True)]
        row = {
            "call": parsed.call,
            "comparison": parsed.comparison,
            "model": comparison.model,
            "variant": name,
            "kernels": parsed.kernels,
            "r": parsed.r,
            "batch": parsed.batch,
            "seq": parsed.seq,
            "policy": "none",
            "tokens_per_s": round(comparison.tokens / statistics.median(series), 1),
            "step_ms": round(statistics.median(series) * 1e3, 2),
            "speed_to_first": round(statistics.median(ratios), 4),
            "ratios": [round(ratio, 4) for ratio in ratios],
            "planned_gib": round(one.planned_gib, 3),
            "compile_s": round(one.compile_seconds, 1),
        }
        rows.append(row | origin(parsed.commit))
    return rows


def read_arguments() -> argparse.Namespace:
    """Returns what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("comparison", choices=list(COMPARISONS))
    parser.add_argument("--model", choices=list(SHAPES), help="of methods and bias")
    parser.add_argument("--blocks", type=int, default=4, help="of blocks")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--kernels", nargs="+", default=["auto"])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="per turn")
    parser.add_argument("--profile", action="store_true", help="print each variant's kernels")
    parser.add_argument("--call", required=True, help="names this run on this machine")
    parser.add_argument("--commit", required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    """Measures one comparison."""
    parsed = read_arguments()
    comparison = COMPARISONS[parsed.comparison](parsed)
    compiled = compile_all(comparison)
    times = time_in_turns(compiled, comparison.batch, parsed.turns, parsed.steps)
    rows = rows_of(comparison, compiled, times, parsed)
    append_rows(parsed.out, rows)
    for row in rows:
        print(
            f"{row['variant']:32s} {row['tokens_per_s']:9.1f} tokens/s {row['step_ms']:8.2f} ms, "
            f"speed to the first {row['speed_to_first']:.4f}, planned {row['planned_gib']:.2f} GiB",
            flush=True,
        )
    if parsed.profile:
        for name, one in compiled.items():
            print(f"--- {name}")
            for kernel, calls, ms in kernel_table(one, comparison.batch)[:32]:
                print(f"{ms:9.3f} ms {calls:7.1f} x {kernel[:90]}")


if __name__ == "__main__":
    main()
