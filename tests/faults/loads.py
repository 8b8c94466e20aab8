"""Long runs and large data: memory stays where it is."""

import itertools
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.processes import in_child, read_status, start, wait
from tests.faults.runs import make_trainer

ROOT = Path(__file__).parents[2]
MIB = 2**20
FEW_MEGABYTES = 50
MEASURED = "measurements/determinism_h200.jsonl"
"""In docs: what the guard within the compiled step takes on a GPU."""


def soak(count: int, folder: Path) -> tuple[int, int]:
    """L1: thousands of steps, saved every ten: no growth of memory, open files or threads."""
    marks = folder / "marks.json"

    def work():
        import gc
        import threading

        def measure():
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            files = len(os.listdir("/proc/self/fd"))
            return [pages * os.sysconf("SC_PAGE_SIZE"), files, threading.active_count()]

        found = []

        def listen(event):
            if event.get("step") in (count // 5, count - 5) and "loss" in event:
                made.checkpoints.wait()  # what a save in progress has open is no growth
                found.append(measure())
                marks.write_text(json.dumps(found))

        options: dict[str, Any] = {"train__max_steps": count, "save__save_steps": 10}
        options |= {"save__save_total_limit": 2, "keep": False}
        made, _ = make_trainer(folder / "run", listeners=(listen,), **options)
        made.train()

    ended = wait(start(work), 3600) == 0
    (early, late), kept = json.loads(marks.read_text()), folder / "run" / "checkpoints"
    print(f"     resident bytes, open files, threads: {early} then {late}")
    grown = [b / a - 1 for a, b in zip(early, late, strict=True)]
    few = len(list(kept.glob("step-*"))) == 2 and not list(kept.glob(".partial-*"))
    checks = [ended, few, *(growth < 0.01 for growth in grown)]
    return sum(checks), len(checks)


def write_rows(path: Path, rows: int, tokens: int) -> None:
    """Writes rows of token ids; a hundred different ones, over and over."""
    different = []
    for index in range(100):
        ids = [(index * 7 + i * 13) % 500 for i in range(tokens)]
        different.append(json.dumps({"input_ids": ids, "labels": ids}).encode() + b"\n")
    with path.open("wb", buffering=2**24) as file:
        for line in itertools.islice(itertools.cycle(different), rows):
            file.write(line)


def growth_of(work: Callable[[], object]) -> int:
    """Returns by how many bytes the memory that the system cannot take back grew at most."""

    def resident() -> int:
        # Files in memory count too: the folder for temporary files may be one.
        return read_status("RssAnon") + read_status("RssShmem")

    before = most = resident()
    ended = threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.02):
            most = max(most, resident())

    thread = threading.Thread(target=watch)
    thread.start()
    work()
    ended.set()
    thread.join()
    return most - before


def read_data(paths: list[Path], length: int) -> Any:
    """Returns the batches of files of rows, as a run has them."""
    from lorax.config.data import DataConfig
    from lorax.data.batches import Batches
    from lorax.data.chat.tokenizer import load_tokenizer
    from lorax.data.encode import load_encoded_dataset
    from lorax.recovery.identity import fingerprint_data

    config = DataConfig.model_validate(
        {
            "train": [{"path": str(path)} for path in paths],
            "max_seq_length": length,
            "overlong": "truncate",
        }
    )
    tokenizer = load_tokenizer(str(ROOT / "examples" / "tiny" / "model"))
    data = load_encoded_dataset(config.train, config, tokenizer, vocab_size=512)
    fingerprint_data(data)
    options: dict[str, Any] = {"max_seq_length": length, "packing": False, "shuffle": True}
    return Batches(data, rows_per_micro_batch=2, micro_batches=4, seed=0, **options)


def seconds_to_first(plan: Any, step: int) -> float:
    """Returns how long the first batch from a step on takes."""
    started = time.monotonic()
    next(plan.epoch(0, step))
    return time.monotonic() - started


def load_much(count: int, folder: Path) -> tuple[int, int]:
    """L2: GBs of rows, rows of 1 MB, 10^5 files in constant memory; going on is O(1)."""
    rows = count * 10_000  # of 10 kB
    large, long, many, tiny = (folder / name for name in ("large", "long", "many", "tiny"))
    large, long, many = (path.with_suffix(".jsonl") for path in (large, long, many))
    write_rows(large, rows, 1050)
    write_rows(long, 20, 100_000)
    write_rows(many, rows, 3)
    tiny.mkdir()
    files = [tiny / f"{i}.jsonl" for i in range(min(count * 1000, 100_000))]
    for path in files:
        path.write_text('{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}\n')

    def is_constant(paths: list[Path], length: int, rows: int, limit: int) -> bool:
        plans: list[Any] = []
        read_data(files[:1], length)  # what is imported and opened once is no growth
        started = time.monotonic()
        grown = growth_of(lambda: plans.append(read_data(paths, length)))
        seconds, size = time.monotonic() - started, sum(path.stat().st_size for path in paths)
        print(
            f"     {size / 1e9:.2f} GB, {rows:,} rows: {grown / MIB:.0f} MiB, {seconds:.0f} s",
            flush=True,
        )
        return len(plans[0].dataset) == rows and grown < limit

    def is_at_once() -> bool:
        plan = read_data([large], 2048)
        last = plan.steps_per_epoch - 1
        early, late = (min(seconds_to_first(plan, at) for _ in range(5)) for at in (0, last))
        print(f"     first batch from step 0: {early:.3f} s, from step {last}: {late:.3f} s")
        return late < 1.5 * early + 0.01

    # Per row a few numbers are kept, of its tokens none.
    trials = [
        lambda: is_constant([large], 2048, rows, 64 * MIB + 128 * rows),
        lambda: is_constant([long], 2**17, 20, 64 * MIB),
        lambda: is_constant(files, 64, len(files), 64 * MIB + 1024 * len(files)),
        is_at_once,
    ]
    return sum(in_child(trial, 7200, silent=False) for trial in trials), len(trials)


def hold_up(store: Any, arrays: Any, clock: Callable[[], float]) -> float:
    """Returns how long a save holds up who asks; one that waits for its writer never ends."""
    asked_back = threading.Event()
    write = store._write

    def write_later(*given):
        asked_back.wait()
        write(*given)

    store._write = write_later
    started = clock()
    store.save(1, arrays, {})
    seconds = clock() - started
    asked_back.set()
    return seconds


def weigh_checks(count: int, folder: Path) -> tuple[int, int, dict[str, float]]:
    """L3: a step's checks take < 1 % of 8B's on a GPU; saving 500 MB holds a run up for < 1 s."""
    import numpy as np

    from lorax.recovery.store import CheckpointStore
    from lorax.training.events import is_spike

    measured = [json.loads(line) for line in (ROOT / "docs" / MEASURED).read_text().splitlines()]
    (step_ms, *_) = [row["step_ms"] for row in measured if row.get("compiled") == "default"][-1:]
    (guard, *_) = [row["ratio"] for row in measured if row.get("compiled") == "unguarded"][-1:]
    trainer, _ = make_trainer(folder / "run", train__max_steps=2)
    trainer.train()
    losses, turns = [2.0 + 0.01 * (i % 7) for i in range(50)], 1000
    trainer._long.wait((), 64, time.perf_counter(), trainer._stop)
    # A short form runs beside other tests, so there only this thread's own time counts.
    clock = time.perf_counter if count > FEW_MEGABYTES else time.thread_time
    started = clock()
    for step in range(turns):
        trainer._prepare_to_drop(64)
        trainer._beat()
        trainer._long.wait((), 64, time.perf_counter(), trainer._stop)
        trainer.saver.check()
        trainer.progress.note(step, 2.0)
        is_spike(2.0, losses)
    checks_ms = (clock() - started) * 1e3 / turns
    # What the compiled guard takes was measured on the GPU, as the time without it over that with.
    share = checks_ms / step_ms + abs(1 - guard)
    rows = count * MIB // 4 // 500
    arrays = {f"m.{i}": np.full(rows, i, np.float32) for i in range(500)}
    store = CheckpointStore(folder / "large" / "checkpoints")
    started = time.perf_counter()
    held_up = hold_up(store, arrays, clock)
    store.wait()
    on_disk = time.perf_counter() - started
    store.close()
    started = time.perf_counter()
    whole = store.restore() is not None
    verified = time.perf_counter() - started
    store.close()
    figures = {
        "checks_ms": round(checks_ms, 3),
        "share_of_step": round(share, 5),
        "megabytes": count,
        "held_up_s": round(held_up, 2),
        "on_disk_s": round(on_disk, 2),
        "verified_s": round(verified, 2),
    }
    print(f"     {figures}")
    return (share < 0.01) + (whole and held_up < 1.0), 2, figures


CASES = {
    "L1": (soak, 10_000, 200),
    "L2": (load_much, 100, 1),
    "L3": (weigh_checks, 500, FEW_MEGABYTES),
}
"""By id: what to run, how often by hand, and how often in the tests."""
