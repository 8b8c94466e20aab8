"""Draws the loss curves of one batch split in five ways, and of the mean of means.

    python -m scripts.make.accumulation_figure

Trains the demo's model on a mix of long and one-word answers, 16 rows a step in the same order,
split as b16/g1 … b1/g16. Writes docs/measurements/gradient_accumulation.jsonl (a row per step and
split) and docs/images/gradient_accumulation.png.
"""

import datetime
import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from matplotlib.figure import Figure

import lorax
from lorax.config.data import DataConfig, DataSource
from lorax.config.train import TrainConfig
from lorax.data.batches import Batches
from lorax.data.chat.tokenizer import load_tokenizer
from lorax.data.dataset import EncodedDataset
from lorax.data.encode import load_encoded_dataset
from lorax.interop.load import load_model
from lorax.objectives.sft import causal_lm_loss
from lorax.system.versions import library_versions
from lorax.training.optim.optimizer import make_optimizer
from lorax.training.step import TrainState, make_train_step

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples/tiny/model"
DATA = ROOT / "examples/tiny/data/train.jsonl"
ROWS = 16
STEPS = 60
SPLITS = [(16, 1), (8, 2), (4, 4), (2, 8), (1, 16)]
NAIVE_SPLITS = [(4, 4), (1, 16)]
TRAIN = TrainConfig(learning_rate=2e-3, lr_scheduler_type="constant", max_steps=STEPS)


def make_dataset() -> EncodedDataset:
    """Returns rows whose answers are records of about 40 tokens or single words, in turn."""
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    for index, row in enumerate(rows):
        question, answer = row["messages"]
        article = json.loads(answer["content"])
        if index % 2:
            question["content"] = f"What colour is the {article['item']}?"
            answer["content"] = article["colour"]
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
        file.flush()
        source = DataSource(path=file.name)
        config = DataConfig(train=(source,), max_seq_length=128)
        return load_encoded_dataset([source], config, load_tokenizer(str(MODEL)))


def exact_step(model: nnx.Module) -> tuple[Callable, TrainState]:
    """Returns lorax's step."""
    return make_train_step(model, make_optimizer(TRAIN, STEPS))


def naive_step(model: nnx.Module) -> tuple[Callable, TrainState]:
    """Returns a step that averages the means of the micro-batches, as is often done."""
    optimizer = make_optimizer(TRAIN, STEPS)
    graph, trainable, frozen = lorax.split_trainable(model)
    state = TrainState(
        jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), jnp.zeros((), bool)
    )

    def mean_loss(trainable, batch):
        total, count = causal_lm_loss(nnx.merge(graph, trainable, frozen), batch)
        return total / jnp.maximum(count, 1).astype(jnp.float32), (total, count)

    @jax.jit
    def step(state, batch):
        def add(sums, micro_batch):
            grads, parts = jax.grad(mean_loss, has_aux=True)(state.trainable, micro_batch)
            return jax.tree.map(jnp.add, sums, (grads, parts)), None

        zeros = jax.tree.map(jnp.zeros_like, state.trainable)
        start = (zeros, (jnp.float32(0), jnp.int32(0)))
        (grads, (total, count)), _ = jax.lax.scan(add, start, batch)
        micro_batches = batch["labels"].shape[0]
        grads = jax.tree.map(lambda g: g / micro_batches, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = jax.tree.map(jnp.add, state.trainable, updates)
        loss = total / count.astype(jnp.float32)
        return TrainState(state.step + 1, trainable, opt_state, state.halted), {"loss": loss}

    return step, state


def run(dataset: EncodedDataset, rows: int, micro_batches: int, make_step: Callable) -> list[float]:
    """Returns the loss of every step, always the token-weighted one of all 16 rows."""
    base = load_model(MODEL, dtype=jnp.float32)
    model = lorax.apply_lora(base, lorax.LoraConfig(r=8), rngs=nnx.Rngs(0))
    step, state = make_step(model)
    plan = Batches(
        dataset,
        rows_per_micro_batch=rows,
        micro_batches=micro_batches,
        packing=False,
        max_seq_length=128,
        seed=3407,
        shuffle=True,
    )
    full_steps = len(dataset) // ROWS
    losses: list[float] = []
    for epoch in range(STEPS // full_steps + 1):
        for index, batch in enumerate(plan.epoch(epoch)):
            if index < full_steps and len(losses) < STEPS:
                state, metrics = step(state, batch)
                losses.append(float(metrics["loss"]))
    return losses


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """Draws all curves, and how far each is from b16/g1."""
    figure = Figure(figsize=(9, 6.5), dpi=150, layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, gridspec_kw={"height_ratios": [3, 2]})
    steps = range(1, STEPS + 1)
    reference = curves["exact b16/g1"]
    widths = iter([9, 7, 5, 3, 1.2])
    colors = iter(["#c6dbef", "#9ecae1", "#6baed6", "#3182bd", "#08306b"])
    reds = iter(["#fdae6b", "#d94801"])
    for name, losses in curves.items():
        gap = [max(abs(a - b), 1e-9) for a, b in zip(losses, reference, strict=True)]
        if name.startswith("exact"):
            color = next(colors)
            top.plot(steps, losses, color=color, linewidth=next(widths), label=name)
        else:
            color = next(reds)
            top.plot(steps, losses, "--", color=color, linewidth=1.8, label=name)
        if name != "exact b16/g1":
            bottom.plot(steps, gap, color=color, linewidth=1.5)
    top.set_title(
        "One batch of 16 rows, split five ways: the curves lie on each other",
        loc="left",
        fontweight="bold",
    )
    top.set_ylabel("loss (nats per token)")
    top.legend(frameon=False, ncols=2)
    bottom.set_yscale("log")
    bottom.set_ylabel("|loss − loss of b16/g1|")
    bottom.set_xlabel("optimizer step")
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    """Runs all splits, writes the rows and the picture."""
    dataset = make_dataset()
    curves = {f"exact b{b}/g{g}": run(dataset, b, g, exact_step) for b, g in SPLITS}
    for b, g in NAIVE_SPLITS:
        curves[f"mean of means b{b}/g{g}"] = run(dataset, b, g, naive_step)
    versions = library_versions()
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True)
    record = ROOT / "docs/measurements/gradient_accumulation.jsonl"
    with record.open("w", encoding="utf-8") as file:
        for split, losses in curves.items():
            for step, loss in enumerate(losses, start=1):
                row = {"split": split, "step": step, "loss": loss}
                file.write(json.dumps(row) + "\n")
        summary = {
            "largest_gap_to_b16_g1": {
                name: max(abs(a - b) for a, b in zip(losses, curves["exact b16/g1"], strict=True))
                for name, losses in curves.items()
            },
            "versions": versions,
            "commit": commit.stdout.strip(),
            "date": datetime.date.today().isoformat(),
        }
        file.write(json.dumps(summary) + "\n")
    picture = ROOT / "docs/images/gradient_accumulation.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(curves, picture)
    print(json.dumps(summary["largest_gap_to_b16_g1"], indent=2))


if __name__ == "__main__":
    main()
