"""The checkpoint store under kills, damage, full disks and other people's files."""

import contextlib
import ctypes
import errno
import hashlib
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np

from lorax.recovery.files import Stacks, read_checkpoint, write_checkpoint
from lorax.recovery.store import CheckpointStore, SaveError
from lorax.system.files import CheckpointError
from tests.faults.processes import in_child, start, wait

ARRAYS, SIZE = 12, 4096


def make_arrays(step: int) -> dict[str, np.ndarray]:
    """Returns the state of a step: what is restored is compared with it bit by bit."""
    random_state = np.random.default_rng(step)
    arrays = {f"weight.{i}": random_state.standard_normal(SIZE, np.float32) for i in range(ARRAYS)}
    return arrays | {"step": np.asarray(step, np.int32)}


def is_exact(found, allowed) -> bool:
    """Says whether a restored checkpoint is that of one of some steps, bit by bit."""
    if found is None or found.step not in allowed:
        return False
    wanted = make_arrays(found.step)
    return wanted.keys() == found.arrays.keys() and all(
        wanted[k].tobytes() == found.arrays[k].tobytes() for k in wanted
    )


def make_store(folder: Path, **options) -> CheckpointStore:
    """Returns a store that says nothing."""
    return CheckpointStore(folder, tell=lambda _: None, **options)


def restores(folder: Path, allowed) -> bool:
    """Restores in a process of its own; says whether one of `allowed` came, bit by bit."""

    def work() -> bool:
        with contextlib.closing(make_store(folder)) as store:
            return is_exact(store.restore(), allowed)

    return in_child(work)


def fill(folder: Path, steps, **options) -> None:
    """Saves some steps in a process of its own."""

    def work() -> bool:
        with contextlib.closing(make_store(folder, **options)) as store:
            for step in steps:
                store.save(step, make_arrays(step), {"x": step}, wait=True)
        return True

    assert in_child(work)


def kill_at_random(count: int, folder: Path) -> tuple[int, int]:
    """F1: SIGKILL at random times while one save follows another."""
    passed = 0
    for trial in range(count):
        run = folder / str(trial)
        fill(run, [1])
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            store = make_store(run)
            os.write(writer, b"\x01")
            for step in range(2, 200):
                store.save(step, make_arrays(step), {}, wait=True)
                os.write(writer, bytes([step]))
            os._exit(0)
        os.close(writer)
        os.read(reader, 1)
        time.sleep(random.Random(trial).uniform(0.0, 1.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reader, "rb") as pipe:
            committed = ([1, *pipe.read()])[-1]
        passed += restores(run, (committed, committed + 1))
        shutil.rmtree(run)
    return passed, count


def count_calls(run: Path) -> int:
    """Returns how many calls that change files a save with a removal makes."""
    reader, writer = os.pipe()

    def work() -> bool:
        store = make_store(run)
        store.open()
        os.access("/torture/arm/1000000000", os.F_OK)
        store.save(3, make_arrays(3), {}, wait=True)
        os.write(writer, str(ctypes.CDLL(None).torture_count()).encode())
        return True

    assert in_child(work)
    return int(os.read(reader, 20))


def kill_at_every_call(count: int, folder: Path) -> tuple[int, int]:
    """F2: SIGKILL before every write, fsync, rename, mkdir and unlink of a save that prunes."""
    if "torture" not in os.environ.get("LD_PRELOAD", ""):
        raise RuntimeError(
            "F2 needs the interposed calls: run tests.faults.scorecard, with a C compiler"
        )
    template = folder / "template"
    fill(template, [1, 2])
    calls = count_calls(_copy(template, folder / "count"))
    points = range(1, calls + 1) if count <= 0 else np.linspace(1, calls, min(count, calls))
    passed = total = 0
    for point in map(int, points):
        run = folder / str(point)

        def work(run=run, point=point) -> int:
            store = make_store(run)
            store.open()
            os.access(f"/torture/arm/{point}", os.F_OK)
            store.save(3, make_arrays(3), {}, wait=True)
            return 0

        killed = False
        for _ in range(3):  # a save may make a call less than the one that was counted
            shutil.rmtree(run, ignore_errors=True)
            _copy(template, run)
            if killed := wait(start(work), 600) == -signal.SIGKILL:
                break
        total += 1
        passed += killed and restores(run, (2, 3))
        shutil.rmtree(run)
    return passed, total


def _copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, symlinks=True)
    return target


def damage_files(count: int, folder: Path) -> tuple[int, int]:
    """F3: flips, truncates, empties or removes any file of the newest checkpoint."""
    template = folder / "template"
    fill(template, [1, 2])
    results = folder / "passed"

    def work() -> bool:
        draw, passed = random.Random(0), 0
        for trial in range(count):
            run = _copy(template, folder / str(trial))
            newest = run / "step-000000002"
            files = sorted(p for p in newest.rglob("*") if p.is_file())
            weights = [max(p.stat().st_size, 1) ** 0.5 for p in files]
            path = draw.choices(files, weights)[0]
            damage(path, draw)
            with contextlib.closing(make_store(run)) as store:
                found = store.restore()
                kept = [p for p in run.iterdir() if p.name.startswith("damaged-000000002-")]
                ok = found is not None and (found.step == 2 or len(kept) == 1)
                passed += ok and is_exact(found, (1, 2))
            shutil.rmtree(run)
        results.write_text(str(passed))
        return True

    assert in_child(work)
    return int(results.read_text()), count


def damage(path: Path, draw: random.Random) -> None:
    """Does one of four things to a file."""
    data = bytearray(path.read_bytes())
    kind = draw.choice(["flip", "flip", "truncate", "empty", "remove"])
    if kind == "remove":
        path.unlink()
        return
    if kind == "flip" and data:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "truncate":
        data = data[: draw.randrange(len(data) + 1)]
    else:
        data = bytearray()
    path.write_bytes(data)


def fail_writes(count: int, folder: Path) -> tuple[int, int]:
    """F4: the disk is full, the quota used up, the file too large, the file system read-only."""
    errors = [errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS]
    template = folder / "template"
    fill(template, [1, 2])
    calls = count_calls(_copy(template, folder / "count"))
    passed = 0
    for trial in range(count):
        run = _copy(template, folder / str(trial))
        # Calls that remove do not fail, and the last quarter of a save does little else.
        point = 1 + random.Random(trial).randrange(calls * 3 // 4)
        error = errors[trial % len(errors)]

        def work(run=run, point=point, error=error) -> bool:
            store = make_store(run)
            store.open()
            os.access(f"/torture/arm/{point}/{error}", os.F_OK)
            try:
                store.save(3, make_arrays(3), {}, wait=True)
            except SaveError as failure:
                failed = ctypes.CDLL(None).torture_failed()
                os.access("/torture/arm/0", os.F_OK)
                named = str(run) in str(failure)
                return failed > 0 and named and not list(run.glob(".partial-*"))
            return False

        passed += in_child(work) and restores(run, (2, 3))
        shutil.rmtree(run)
    return passed, count


def leave_foreign_files(count: int, folder: Path) -> tuple[int, int]:
    """F6: what is not lorax's stays as it is, whatever its name."""
    names = [
        "step-000000000",
        ".partial-mine",
        "7",
        "step-7",
        "step-000000001x",
        "1.orbax-checkpoint-tmp",
        "damaged",
        "notes.txt",
    ]
    names += ["link", "partial-000000001", "step_000000001", "STEP-000000001"]
    passed = 0
    for trial, name in enumerate((names * count)[:count]):
        run = folder / str(trial)
        fill(run, [1])
        foreign = run / name
        if name == "link":
            foreign.symlink_to(folder)
        elif name.endswith(".txt"):
            foreign.write_text("mine")
        else:
            foreign.mkdir()
            (foreign / "data.bin").write_bytes(b"mine")
        before = hash_tree(foreign)
        fill(run, range(2, 6))
        passed += hash_tree(foreign) == before and restores(run, (5,))
    return passed, count


def hash_tree(path: Path) -> str:
    """Returns a digest of a file, a link or all that is in a folder."""
    digest = hashlib.sha256()
    for each in [path, *sorted(path.rglob("*"))] if not path.is_symlink() else [path]:
        digest.update(str(each).encode())
        digest.update(os.readlink(each).encode() if each.is_symlink() else b"")
        digest.update(each.read_bytes() if each.is_file() and not each.is_symlink() else b"")
    return digest.hexdigest()


def share_a_folder(count: int, folder: Path) -> tuple[int, int]:
    """F7: of two processes in one folder one is refused and the other unharmed."""
    passed = 0
    for trial in range(count):
        run, children = folder / str(trial), []
        start = time.monotonic() + 0.05
        for _ in range(2):
            if (child := os.fork()) == 0:
                status = 3
                with contextlib.suppress(BaseException):
                    time.sleep(max(0.0, start - time.monotonic()))
                    store = make_store(run)
                    try:
                        store.open()
                    except CheckpointError as error:
                        status = 2 if "is in use by" in str(error) else 3
                    else:
                        store.save(1, make_arrays(1), {}, wait=True)
                        time.sleep(0.3)
                        store.close()
                        status = 0
                os._exit(status)
            children.append(child)
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children)
        passed += codes == [0, 2] and restores(run, (1,))
    return passed, count


def find_partial_folders(count: int, folder: Path) -> tuple[int, int]:
    """F8: empty and half-copied steps, and what a killed process left, are passed over."""
    template, passed = folder / "template", 0
    fill(template, [1, 2])
    for trial in range(count):
        run, draw = _copy(template, folder / str(trial)), random.Random(trial)
        newer = run / "step-000000009"
        kind = trial % 4
        if kind == 0:
            newer.mkdir()
        elif kind == 1:
            shutil.copytree(run / "step-000000002", newer)  # under a name that is not its own
        elif kind == 2:
            shutil.copytree(run / "step-000000002", newer)
            files = sorted(p for p in newer.rglob("*") if p.is_file())
            for path in [*draw.sample(files, len(files) // 2), newer / "manifest.json"]:
                path.unlink(missing_ok=True)
        else:
            shutil.copytree(run / "step-000000002", run / ".partial-000000009-0123abcd")
        left = run / ".partial-000000009-0123abcd"
        passed += restores(run, (2,)) and not left.exists()
    return passed, count


def refuse_nonfinite(count: int, folder: Path) -> tuple[int, int]:
    """F9: NaN and infinity are neither saved nor restored."""
    passed = 0
    for trial in range(count):
        run = folder / str(trial)
        fill(run, [1])

        def work(run=run, trial=trial) -> bool:
            arrays = make_arrays(2)
            arrays["weight.3"][trial] = [np.nan, np.inf, -np.inf][trial % 3]
            with contextlib.closing(make_store(run)) as store:
                if trial % 2:
                    fresh = run / "step-000000002"
                    fresh.mkdir()
                    write_checkpoint(fresh, 2, Stacks.copy(arrays), {}, {})
                    return is_exact(store.restore(), (1,))
                try:
                    store.save(2, arrays, {}, wait=True)
                except CheckpointError as error:
                    whole = read_checkpoint(run / "step-000000001")
                    return "weight.3" in str(error) and is_exact(whole, (1,))
            return False

        passed += in_child(work)
    return passed, count


CASES = {
    "F1": (kill_at_random, 200, 4),
    "F2": (kill_at_every_call, 0, 8),
    "F3": (damage_files, 500, 25),
    "F4": (fail_writes, 20, 4),
    "F6": (leave_foreign_files, 12, 3),
    "F7": (share_a_folder, 20, 3),
    "F8": (find_partial_folders, 10, 4),
    "F9": (refuse_nonfinite, 10, 2),
}
"""By id: what to run, how often by hand, and how often in the tests."""
