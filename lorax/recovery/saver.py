"""Saving a run while it trains, and resuming it from its newest checkpoint."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import jax
from safetensors import SafetensorError

from lorax.config.run import SaveConfig
from lorax.recovery.identity import Identity
from lorax.recovery.progress import Progress, TrainResult
from lorax.recovery.snapshots import WEIGHTS_FOLDER, WeightStore
from lorax.recovery.store import CHECKPOINT_FOLDER, CheckpointStore
from lorax.recovery.tree import fill_tree, flatten_tree
from lorax.system.files import CheckpointError, refuse_occupied
from lorax.system.signals import RunStopped
from lorax.system.versions import library_versions
from lorax.system.wording import describe


class Saver:
    """Saves a run's checkpoints and its weights, and resumes from the newest checkpoint.

    Args:
        config: The number of checkpoints to keep, and the reaction to an error.
        weights: The store of weights; checkpoints record its content.
        checkpoints: The store of checkpoints.
        identity: The run's identity, with all its parts.
        tell: Called with each line for the user.

    A state is a tree that has `step` and `trainable`.
    """

    def __init__(
        self,
        config: SaveConfig,
        weights: WeightStore,
        checkpoints: CheckpointStore,
        identity: Identity,
        tell: Callable[[str], object],
    ):
        self.config = config
        self.weights = weights
        self.checkpoints = checkpoints
        self.identity = identity
        self._tell = tell
        self.progress = Progress()
        self.best: Any = None  # trained weights with the lowest held-out loss, on the host
        self._reported: tuple[int, float] | None = None

    @classmethod
    def of(
        cls,
        config: SaveConfig,
        write: Callable[[Path], object],
        identity: Identity,
        tell: Callable[[str], object],
    ) -> Self:
        """Returns the saver of a run's folder; `write` is as for `WeightStore`."""
        output = Path(config.output_dir)
        keep = config.save_total_limit
        checkpoints = CheckpointStore(
            output / CHECKPOINT_FOLDER, keep=keep, versions=library_versions(), tell=tell
        )
        return cls(config, WeightStore(output / WEIGHTS_FOLDER, write), checkpoints, identity, tell)

    def begin[State](self, state: State, *, resume: bool) -> State:
        """Returns the state that the run begins with, or resumes from.

        Raises:
            CheckpointError: As `resume`, or if a run begins where there is one.
            ValueError: As `resume`.
        """
        if resume:
            return self.resume(state)
        if self.checkpoints.steps():
            raise CheckpointError(
                f"{self.checkpoints.directory} holds a run's checkpoints: resume it with "
                "resume=True (`lorax train … --resume`), or choose another save.output_dir"
            )
        refuse_occupied(self.weights.directory)
        return state

    def resume[State](self, state: State) -> State:
        """Returns the state of the newest whole checkpoint; `state` if there was never one.

        Raises:
            CheckpointError: If there are checkpoints and none is whole, or none fits the model.
            ValueError: If they are another run's, naming what differs.
        """
        try:
            return self._resume(state)
        except BaseException:
            self.checkpoints.close()
            raise

    def _resume(self, state: Any) -> Any:
        found = self.checkpoints.restore(self.identity.manifest)
        if found is None:
            self._tell("no checkpoint yet: the run starts from the beginning")
            return state
        self.identity.go_on_from(found.record)
        self.progress = progress = Progress(**found.record["progress"])
        like: dict[str, Any] = {"state": state}
        if any(path.startswith("best.") for path in found.arrays):
            like["best"] = state.trainable
        restored = fill_tree(like, found.arrays, str(self.checkpoints.directory.parent))
        self.checkpoints.prune(found.step, verified=True)  # a run that is stopped leaves its last
        self.best = jax.device_get(restored["best"]) if "best" in restored else None
        self.weights.adopt(progress.weights, progress.best_step, progress.best_loss)
        then = found.versions
        now = library_versions()
        changed = [f"{k} {then[k]} → {now.get(k)}" for k in sorted(then) if then[k] != now.get(k)]
        if changed:
            self._tell(f"WARNING: the last bits may differ, since {', '.join(changed)}")
        self._tell(f"resumed after step {found.step}")
        return restored["state"]

    def save(self, state: Any, *, wait: bool = False) -> bool:
        """Saves a checkpoint; returns False if that failed and the run may go on without it.

        See `CheckpointStore.save`.
        """
        progress = self.progress
        tree: dict[str, Any] = {"state": state}
        if int(state.step) != progress.step:
            raise CheckpointError(
                f"the state is that of step {int(state.step)}, not {progress.step}: not saved"
            )
        if self.best is not None:
            tree["best"] = self.best
        progress.settled = min(progress.settled, progress.step)  # not that of a dropped step
        progress.weights = self.weights.steps
        progress.best_step = self.weights.best_step
        progress.best_loss = None if progress.best_step is None else self.weights.best_loss
        plain = {name: _finite(value) for name, value in dataclasses.asdict(progress).items()}
        record = {"identity": self.identity.parts, "progress": plain}
        arrays = flatten_tree(tree)
        return self._guard(lambda: self.checkpoints.save(progress.step, arrays, record, wait=wait))

    def save_weights(self, step: int, eval_loss: float | None = None) -> bool:
        """Writes the weights of a step; returns whether they are the best so far."""
        improved = eval_loss is not None and eval_loss < self.weights.best_loss
        if not self._guard(lambda: self.weights.save(step, eval_loss)) and improved:
            assert eval_loss is not None
            self.weights.best_step = step
            self.weights.best_loss = eval_loss
        return improved

    def keep_evaluated(self, step: int, loss: float, trained: Any, patience: int | None) -> None:
        """Writes the weights that were evaluated, and decides whether the run stops early.

        Args:
            step: The step of the weights.
            loss: Their held-out loss.
            trained: On the devices.
            patience: Evaluations without a better one after which the run stops, if any.
        """
        progress = self.progress
        improved = self.save_weights(step, loss)
        if improved and self.config.load_best_model_at_end:
            self.best = jax.device_get(trained)
        progress.evaluations_without_gain = 0 if improved else progress.evaluations_without_gain + 1
        waited = progress.evaluations_without_gain
        progress.stopped_early = patience is not None and waited >= patience

    def result(self) -> TrainResult:
        """Returns the result of the run, with the best weights if those were kept."""
        progress = self.progress
        weights = self.weights
        best_step = None if self.best is None else weights.best_step
        return TrainResult(
            steps=progress.step,
            train_loss=math.nan if progress.train_loss is None else progress.train_loss,
            eval_loss_before=progress.eval_loss_before,
            eval_loss=weights.best_loss if best_step is not None else progress.eval_loss,
            best_step=best_step,
            stopped_early=progress.stopped_early,
        )

    def check(self) -> None:
        """Reports a save that the background thread has finished; raises or reports its error."""
        self._guard(self.checkpoints.check)
        if self._reported != (saved := self.checkpoints.saved):
            assert saved is not None
            self._reported = saved
            at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(saved[1]))
            self._tell(f"checkpoint of step {saved[0]} saved at {at}")

    def stop(self, asked: object, reach: Callable[[], Any]) -> RunStopped:
        """Saves at once; returns the `RunStopped` that ends the run.

        Args:
            asked: The signal's name.
            reach: Brings progress and state up to date, and returns the state.
        """
        self.checkpoints.prunes = False  # a resumed run does; now it would take time
        state = reach()
        if self.progress.step == 0:
            return RunStopped(f"stopped by {asked} before the first step was done")
        saved = "saved" if self.save(state, wait=True) else "NOT SAVED"
        return RunStopped(f"stopped by {asked} after step {self.progress.step}, {saved}")

    def wait(self) -> None:
        """Waits for the save in the background."""
        self._guard(self.checkpoints.wait)
        self.check()

    def rescue(self, reach: Callable[[], Any], error: BaseException) -> None:
        """Saves before an error is raised further; `reach` returns the state to save."""
        try:
            state = reach()
            if self.progress.step > 0:
                self.save(state, wait=True)
        except Exception as second:
            # The first error is the one to see; the checkpoints before this one are whole.
            if str(second) != str(error):
                error.add_note(f"and nothing could be saved after it: {describe(second)}")

    def _guard(self, action: Callable[[], object]) -> bool:
        try:
            action()
            return True
        except (CheckpointError, SafetensorError, OSError) as error:
            if self.config.on_save_error == "stop":
                raise
            self._tell(f"WARNING: {describe(error)}. The run goes on (save.on_save_error: warn)")
            return False


def _finite(value: Any) -> Any:
    """Returns `value`, or None for a number that is not finite, which JSON does not hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
