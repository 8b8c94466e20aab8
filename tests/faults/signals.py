"""Runs that end before their time, by signals and otherwise."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from tests.faults.processes import cpu_seconds, in_child, start, wait, wait_and_count
from tests.faults.runs import STEPS, last_arrays, make_trainer, newest

FEW = 2
"""Trials of `terminate` in the tests: one of each kind of step."""


def leave_in_every_way(count: int, folder: Path) -> tuple[int, int]:
    """F5: however a run ends, what it reached is on the disk, and the process is gone at once."""
    ways = ["return", "sys.exit", "exception", "SIGINT", "SIGTERM", "exceptions"]
    passed = 0
    for trial in range(count):
        way, run, at = ways[trial % len(ways)], folder / str(trial), 3 + trial % 4

        def listen(event, way=way, at=at):
            late = way == "exceptions" and event.get("step", 0) > at
            if (event.get("step") != at and not late) or "loss" not in event:
                return
            if way == "sys.exit":
                raise SystemExit(3)
            if way.startswith("exception"):
                raise RuntimeError("planned")
            if way.startswith("SIG"):
                os.kill(os.getpid(), getattr(signal, way))

        def work(run=run, listen=listen):
            trainer, _ = make_trainer(run, listeners=(listen,), save__save_steps=100)
            trainer.train()

        # Beside other tests the machine may be busy; one that hangs never ends.
        status = wait(start(work), 60 if count > FEW else 600)
        wanted = {"return": 0, "sys.exit": 3, "exception": 1, "exceptions": 1}.get(way, 75)
        reached = STEPS if wanted == 0 else at
        passed += status == wanted and reached <= newest(run) <= min(reached + 1, STEPS)
    return passed, count


def make_endless(model, batch):
    """Returns the usual loss of a step that takes half an hour, but for the row with the mark."""
    import jax
    import jax.numpy as jnp

    from lorax.objectives.sft import causal_lm_loss

    total, count = causal_lm_loss(model, batch)
    marked = (batch["input_ids"] == 63).any()
    square = jnp.ones((64, 64)) * marked
    turns = marked * 10**8
    spun = jax.lax.fori_loop(0, turns, lambda _, x: jnp.tanh(x @ x), square)
    return total + 0 * spun.sum(), count


def wait_until(child: int, sign: Path, seconds: float = 600.0) -> None:
    """Waits for a file of a process, which is killed if it ends or hangs before."""
    end = time.monotonic() + seconds
    while not sign.exists():
        hangs = time.monotonic() > end
        if hangs or os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            os.kill(child, signal.SIGKILL)
            raise AssertionError(f"no {sign.name}: it {'hangs' if hangs else 'ended'}")
        time.sleep(0.01)


def terminate(count: int, folder: Path) -> tuple[int, int]:
    """P1: SIGTERM during steps, short ones and endless ones: saved, status 75, within 10 s."""

    def make(run: Path, is_endless: bool, **options: Any):
        from lorax.training import long_steps

        options = {"train__max_steps": 200} | options
        if is_endless:
            long_steps.LONG_SECONDS = 0.0  # the steps before the endless one are none
            options["loss_fn"] = make_endless
        trainer, _ = make_trainer(run, **options)
        if is_endless:
            epoch, at = divmod(2, trainer.batches.steps_per_epoch)
            data = trainer.batches.dataset
            data.tokens[data.offsets[trainer.batches.rows(epoch, at)[0][0]]] = 63
        return trainer

    def train_straight(run: Path, is_endless: bool, last: int) -> None:
        def end(event):
            if event.get("step") == last and "loss" in event:
                raise SystemExit(0)

        # With these steps alone, the one that does not end is never begun.
        options: dict[str, Any] = {"listeners": (end,), "save__save_steps": last}
        with contextlib.suppress(SystemExit):
            make(run, is_endless, **options).train()

    passed = 0
    # Few trials run beside other tests, so there only their own time counts.
    clock = time.monotonic if count > FEW else None
    for trial in range(count):
        run, is_endless = folder / str(trial), trial % 2 == 1

        def work(run=run, is_endless=is_endless):
            def slowly(event):
                (run / "trains").touch()
                time.sleep(0.05)

            make(run, is_endless, listeners=(slowly,), save__save_steps=500).train()

        child = start(work)
        wait_until(child, run / "trains")
        time.sleep(random.Random(trial).uniform(0.3, 2.0) + 2.0 * is_endless)
        asked = clock() if clock else cpu_seconds(child)
        os.kill(child, signal.SIGTERM)
        status, used = wait_and_count(child, 600)
        in_time = status == 75 and (clock() if clock else used) - asked < 10

        def is_right(run=run, is_endless=is_endless, straight=folder / f"{trial}-straight") -> bool:
            if (step := newest(run)) == 0:
                return False
            train_straight(straight, is_endless, step)
            return last_arrays(run, step) == last_arrays(straight, step)

        passed += in_time and in_child(is_right)
    return passed, count


CASES = {
    "F5": (leave_in_every_way, 30, 6),
    "P1": (terminate, 20, FEW),
}
"""By id: what to run, how often by hand, and how often in the tests."""
