"""Weights written during a run: whole or not at all, the newest and the best kept."""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from lorax.system.files import write_file

WEIGHTS_FOLDER = "weights"
"""The folder of weights in a run's folder."""


class WeightStore:
    """Writes a run's weights to ``<directory>/step-000123`` and keeps the newest and the best.

    A folder appears under its name only when it is complete. Only folders that this run wrote, or
    that hold files of the same names where this run writes, are ever removed, and only after a
    newer one is complete.

    Args:
        directory: A folder of the run, created by the first write.
        write: Writes the current weights into a folder that does not exist yet.
    """

    def __init__(self, directory: Path, write: Callable[[Path], object]):
        self.directory = directory
        self._write = write
        self._written: dict[int, Path] = {}
        self.best_step: int | None = None
        self.best_loss = math.inf

    def adopt(self, steps: Iterable[int], best_step: int | None, best_loss: float | None) -> None:
        """Registers the folders that this run wrote before it stopped, if they still exist."""
        folders = {step: self._folder(step) for step in steps}
        self._written = {step: folder for step, folder in folders.items() if folder.is_dir()}
        if best_loss is not None:
            self.best_step = best_step
            self.best_loss = best_loss

    @property
    def steps(self) -> list[int]:
        """Steps whose weights are on the disk."""
        return sorted(self._written)

    def save(self, step: int, eval_loss: float | None = None) -> bool:
        """Writes the weights of `step`, if not done yet; returns whether they are the best so far.

        Args:
            step: Optimizer steps done.
            eval_loss: Held-out loss of these weights, if it was measured.
        """
        if step not in self._written:
            self.directory.mkdir(parents=True, exist_ok=True)
            folder = self._folder(step)
            left = None
            if folder.exists():
                left = folder.with_name(f".{folder.name}.superseded-{time.time_ns()}")
                folder.rename(left)
            self._write(folder)
            self._written[step] = folder
            # The resumed run repeats this step. A folder with other files is not lorax's and stays.
            if left is not None and _names(left) == _names(folder):
                shutil.rmtree(left)
        improved = eval_loss is not None and eval_loss < self.best_loss
        if improved:
            assert eval_loss is not None
            self.best_loss = eval_loss
            self.best_step = step
            self._point_to_best()
        self._remove_superseded()
        return improved

    def best_path(self) -> Path | None:
        """Returns the folder with the lowest held-out loss, if any was measured."""
        return None if self.best_step is None else self._written.get(self.best_step)

    def describe(self) -> str:
        """Names the weights on the disk, for a message."""
        if not self._written:
            return "checkpoints/ holds what was reached, if anything was"
        return f"the last weights saved are in {self._written[max(self._written)]}"

    def _folder(self, step: int) -> Path:
        return self.directory / f"step-{step:06d}"

    def _point_to_best(self) -> None:
        path = self.best_path()
        assert path is not None
        record = {"step": self.best_step, "eval_loss": self.best_loss, "path": path.name}
        write_file(self.directory / "best.json", json.dumps(record) + "\n")

    def _remove_superseded(self) -> None:
        newest = max(self._written)
        for step in [s for s in self._written if s not in (newest, self.best_step)]:
            shutil.rmtree(self._written.pop(step))


def _names(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))
