"""Whole runs that are killed, resumed, changed and poisoned, beside runs that are not."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from tests.faults.processes import in_child, start, wait
from tests.tiny import LLAMA

STEPS = 8


def make_trainer(folder: Path, *, resume: bool = False, **changes: Any):
    """Returns a trainer of a tiny run and the list that its events go to.

    Args:
        folder: Of the run.
        resume: As `Trainer` takes it.
        **changes: ``dropout``, ``rank``, ``lora`` (further settings of the adapter),
            ``seed_of_rows``, ``seed_of_base``, ``loss_fn``, ``listeners``, ``files``, ``keep`` (the
            events), ``masked`` (rows without anything to learn, their tokens moved by ``shift``)
            and settings by name with ``__`` for the dot.
    """
    import numpy as np
    from flax import nnx

    import lorax
    from lorax.config.run import RunConfig
    from lorax.data.dataset import EncodedDataset
    from lorax.models.decoder import CausalLM
    from lorax.models.families import read_architecture
    from lorax.objectives.sft import causal_lm_loss

    settings: dict[str, Any] = {
        "model": {"name_or_path": "unnamed", "dtype": "float32"},
        "data": {"train": "rows.jsonl", "max_seq_length": 64},
        "train": {"max_steps": STEPS, "learning_rate": 1e-2, "per_device_train_batch_size": 2},
        "save": {"output_dir": str(folder), "save_steps": 1, "save_total_limit": 100},
    }
    for name, value in changes.items():
        if "__" in name:
            section, _, key = name.partition("__")
            settings[section] = settings[section] | {key: value}
    seed = changes.get("seed_of_base", 0)
    base = CausalLM(read_architecture(LLAMA, "tiny"), rngs=nnx.Rngs(seed))
    adapter = lorax.LoraConfig(
        r=changes.get("rank", 4),
        lora_dropout=changes.get("dropout", 0.0),
        target_modules=("q_proj", "down_proj"),
        **changes.get("lora", {}),
    )
    draw = np.random.default_rng(changes.get("seed_of_rows", 0))
    rows = []
    for index in range(14):
        tokens = draw.integers(1, 40, int(draw.integers(6, 30)))
        learned = index not in changes.get("masked", ())
        if not learned:
            tokens = (tokens + changes.get("shift", 0)) % 40
        rows.append((tokens, (np.arange(len(tokens)) >= 1 + index % 3) & learned))
    events: list[dict[str, Any]] = []
    trainer = lorax.Trainer(
        lorax.apply_lora(base, adapter, rngs=nnx.Rngs(1)),
        RunConfig.model_validate(settings),
        EncodedDataset.from_rows(rows),
        loss_fn=changes.get("loss_fn", causal_lm_loss),
        listeners=changes.get("listeners", ()) + (events.append,) * changes.get("keep", True),
        resume=resume,
        files=changes.get("files"),
    )
    return trainer, events


def losses(events) -> dict[int, float]:
    """Returns the loss of each step."""
    return {e["step"]: e["loss"] for e in events if "loss" in e}


def last_arrays(folder: Path, step: int = STEPS) -> dict[str, bytes]:
    """Returns the bytes of every array in a checkpoint."""
    from lorax.recovery.files import read_checkpoint

    found = read_checkpoint(folder / "checkpoints" / f"step-{step:09d}")
    return {path: value.tobytes() for path, value in found.arrays.items()}


def resume_everywhere(count: int, folder: Path) -> tuple[int, int]:
    """R1: resumed after each step, with and without dropout, accumulation, packing: equal bits.

    What has dropout has noise on its embeddings too.
    """
    passed = total = 0
    variants = [(d, k, p) for d in (0.0, 0.1) for k in (1, 3) for p in (False, True)]
    for index, (dropout, micro_batches, packing) in enumerate(variants):
        options: dict[str, Any] = {
            "dropout": dropout,
            "train__neftune_noise_alpha": 5.0 if dropout else None,
            "train__gradient_accumulation_steps": micro_batches,
            "data__packing": packing,
        }
        straight = folder / f"{index}"
        trainer, events = make_trainer(straight, **options)
        trainer.train()
        wanted, expected = last_arrays(straight), losses(events)
        for step in range(1, STEPS + 1):
            if total >= count:
                return passed, total
            run = folder / f"{index}-{step}"
            shutil.copytree(straight, run)
            for later in range(step + 1, STEPS + 1):
                shutil.rmtree(run / "checkpoints" / f"step-{later:09d}")
            resumed, found = make_trainer(run, resume=True, **options)
            resumed.train()
            after = {s: loss for s, loss in expected.items() if s > step}
            passed += last_arrays(run) == wanted and losses(found) == after
            total += 1
            shutil.rmtree(run)
    return passed, total


def repeat_in_processes(count: int, folder: Path) -> tuple[int, int]:
    """K4: the same run in processes of their own: the same bits, here on a CPU."""
    from lorax.devices.xla_cache import kept_elsewhere

    # The first two, one packed and one not, are what the others are compared with.
    for trial in range(2 + count):
        options: dict[str, Any] = {"dropout": 0.1, "data__packing": trial % 2 == 1}
        options |= {"train__gradient_accumulation_steps": 2, "train__max_steps": 4}
        run = folder / str(trial)

        def work(run=run, options=options):
            trainer, _ = make_trainer(run, **options)
            with kept_elsewhere():  # each compiles the step for itself
                trainer.train()

        wait(start(work), 300)
    # Only now, since reading starts threads, with which this process must not fork again.
    found = [
        last_arrays(folder / str(t), 4) if newest(folder / str(t)) == 4 else {}
        for t in range(2 + count)
    ]
    passed = sum(found[trial] == found[trial % 2] != {} for trial in range(2, 2 + count))
    return passed, count


def change_something(count: int, folder: Path) -> tuple[int, int]:
    """R2: a run that is resumed as another one is refused, by the name of what changed."""
    changes: list[tuple[dict[str, Any], str]] = [
        ({"train__seed": 1}, "train.seed"),
        ({"train__gradient_accumulation_steps": 2}, "train.gradient_accumulation_steps"),
        ({"train__per_device_train_batch_size": 3}, "train.per_device_train_batch_size"),
        ({"train__learning_rate": 2e-2}, "train.learning_rate"),
        ({"train__max_steps": 9}, "train.max_steps"),
        ({"train__lr_scheduler_type": "linear"}, "train.lr_scheduler_type"),
        ({"data__packing": True}, "data.packing"),
        ({"data__shuffle": False}, "data.shuffle"),
        ({"seed_of_rows": 1}, "training data"),
        ({"rank": 8}, "adapter settings"),
        ({"files": {"tokenizer": "other", "base model": "b"}}, "tokenizer"),
        ({"files": {"tokenizer": "t", "base model": "other"}}, "base model"),
        ({"files": None}, "tokenizer"),
        ({"files": None, "seed_of_base": 1}, "base model changed"),
    ]
    files, passed = {"tokenizer": "t", "base model": "b"}, 0
    make_trainer(folder / "run", files=files, train__max_steps=2)[0].train()
    make_trainer(folder / "plain", files=None, train__max_steps=2)[0].train()
    for change, name in changes[:count]:
        options = {"files": files, "train__max_steps": 2} | change
        run = folder / ("plain" if "seed_of_base" in change else "run")
        try:
            make_trainer(run, resume=True, **options)[0].checkpoints.close()
        except ValueError as error:
            passed += name in str(error)
    return passed, min(count, len(changes))


def newest(folder: Path) -> int:
    """Returns the newest step that has a checkpoint, 0 without one."""
    found = (folder / "checkpoints").glob("step-*")
    return max((int(re.sub(r"\D", "", path.name)) for path in found), default=0)


def kill_twenty_times(count: int, folder: Path) -> tuple[int, int]:
    """R3: killed twenty times at random, a run ends with the bits of one that never was."""
    steps, kills = 60, 20
    options: dict[str, Any] = {
        "train__max_steps": steps,
        "save__save_steps": 2,
        "save__save_total_limit": 2,
    }
    slowly = lambda event: time.sleep(0.03)

    def straight():
        make_trainer(folder / "straight", dropout=0.1, **options)[0].train()

    assert wait(start(straight), 300) == 0
    passed = 0
    for trial in range(count):
        run, draw = folder / str(trial), random.Random(trial)

        def work(run=run):
            resume = (run / "checkpoints" / "LORAX").exists()
            listeners = (slowly,)
            made = make_trainer(run, resume=resume, listeners=listeners, dropout=0.1, **options)
            made[0].train()

        for _ in range(kills):
            child = start(work)
            before, end = newest(run), time.monotonic() + 60
            # Not before it trains; then anywhere in the next few steps, saves included.
            while newest(run) == before < steps and time.monotonic() < end:
                time.sleep(0.005)
            time.sleep(draw.uniform(0.0, 0.25))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        finished = wait(start(work), 300) == 0

        def compare(run=run) -> bool:
            return last_arrays(run, steps) == last_arrays(folder / "straight", steps)

        passed += finished and in_child(compare)
    return passed, count


def poison(count: int, folder: Path) -> tuple[int, int]:
    """N1: NaN, infinity and overflow end the run at their step, with the weights before it."""
    import jax.numpy as jnp

    from lorax.objectives.sft import causal_lm_loss

    poisons = [float("nan"), float("inf"), -float("inf"), 3e38]
    passed = 0
    for trial in range(count):
        poison, micro_batches, packing = poisons[trial % 4], 1 + trial % 3, trial % 2 == 1
        run, clean = folder / str(trial), folder / f"{trial}-clean"
        options: dict[str, Any] = {
            "train__gradient_accumulation_steps": micro_batches,
            "data__packing": packing,
            "train__max_steps": 4,
            "save__save_steps": [1, 100][trial % 2],
        }

        def rotten(model, batch, poison=poison):
            total, tokens = causal_lm_loss(model, batch)
            bad = (batch["input_ids"] == 63).any()
            factor = jnp.where(bad, jnp.float32(poison), 1.0)
            return total * factor, tokens

        def work(
            run=run, clean=clean, rotten=rotten, options=options, compares=trial % 2 == 0
        ) -> bool:
            make_trainer(clean, loss_fn=rotten, **options)[0].train()
            trainer, _ = make_trainer(run, loss_fn=rotten, **options)
            # The token that is poison stands in one row: that of the third step.
            epoch, at = divmod(2, trainer.batches.steps_per_epoch)
            (row, *_), *_ = [r for r in trainer.batches.rows(epoch, at) if r]
            data = trainer.batches.dataset
            data.tokens[data.offsets[row]] = 63
            try:
                trainer.train()
            except FloatingPointError as error:
                bad = 1 + next(
                    s
                    for s in range(4)
                    if any(row in part for part in rows_of_step(trainer.batches, s))
                )
                dumped = json.loads((run / f"nonfinite-step-{bad}.json").read_text())
                named = f"step {bad}:" in str(error) and str(row) in dumped["tokens_by_row"]
                if newest(run) != bad - 1 or not named:
                    return False
                if compares:
                    return bad == 1 or last_arrays(run, bad - 1) == last_arrays(clean, bad - 1)
                # What was saved when it ended goes on, once the cause is gone.
                cured, _ = make_trainer(run, resume=True, **options | {"loss_fn": rotten})
                cured.train()
                return last_arrays(run, 4) == last_arrays(clean, 4)
            return False

        passed += in_child(work)
    return passed, count


def leave_nothing_to_learn(count: int, folder: Path) -> tuple[int, int]:
    """D2: a micro-batch without a target changes nothing, a step or data without one is refused."""
    import numpy as np

    import lorax

    options: dict[str, Any] = {"data__shuffle": False, "train__per_device_train_batch_size": 1}
    options |= {"train__gradient_accumulation_steps": 2, "train__max_steps": 7}
    trainer, events = make_trainer(folder / "part", masked={3, 8}, **options)
    trainer.train()
    # What stands in the rows that nothing is learned from makes no difference.
    other, others = make_trainer(folder / "other", masked={3, 8}, shift=7, **options)
    other.train()
    alike = last_arrays(folder / "part", 7) == last_arrays(folder / "other", 7)
    passed = int(len(losses(events)) == 7 and alike and losses(events) == losses(others))
    for index, masked in enumerate(({2, 3}, set(range(14)))):
        try:
            make_trainer(folder / str(index), masked=masked, **options)
        except ValueError as error:
            passed += "no supervised token" in str(error)
    try:
        rows = trainer.batches.dataset
        empty = dataclasses.replace(rows, supervised=np.zeros_like(rows.supervised))
        lorax.Trainer(trainer.model, trainer.config, rows, empty)
    except ValueError as error:
        passed += "held-out rows hold no supervised token" in str(error)
    return passed, 4


def rows_of_step(plan, step: int) -> list[list[int]]:
    """Returns the rows of a step of a run, from 0."""
    epoch, at = divmod(step, plan.steps_per_epoch)
    return plan.rows(epoch, at)


CASES = {
    "R1": (resume_everywhere, 64, 3),
    "R2": (change_something, 14, 14),
    "R3": (kill_twenty_times, 5, 0),
    "K4": (repeat_in_processes, 20, 3),
    "N1": (poison, 12, 3),
    "D2": (leave_nothing_to_learn, 4, 4),
}
"""By id: what to run, how often by hand, and how often in the tests."""
