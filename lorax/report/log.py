"""The metrics of a run, a JSON line per step: written, and read."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from lorax.system.files import write_file

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """Appends one JSON object per step to `metrics.jsonl`, and scalars for TensorBoard if asked.

    Every line is flushed, so that a killed run keeps what it measured. A number that is NaN or
    infinite is written as null and named in the list `nonfinite`, so that each line stays JSON.
    When a run is resumed, the lines that will come again go first, so that each step stands there
    once: one line of the step itself, and one of its evaluation.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        report_to: Sequence[str] = ("jsonl",),
        *,
        reached: int | None = None,
        evaluated: bool = True,
    ):
        """Opens the files; all of them lie in `run_dir`, which must exist.

        Args:
            run_dir: The run's folder.
            report_to: What is written: `jsonl`, `tensorboard`.
            reached: The step after which a run is resumed, whose later lines go; None keeps all.
            evaluated: Whether the evaluation of that step stays too, or is repeated.

        Raises:
            ValueError: If the directory is missing, or TensorBoard is asked for and not installed.
        """
        directory = Path(run_dir)
        if not directory.is_dir():
            raise ValueError(f"the run directory {directory} does not exist: create it first")
        self._tensorboard = None
        if "tensorboard" in report_to:
            writer = _import_tensorboard().SummaryWriter
            self._tensorboard = writer(str(directory / "tensorboard"))
        self._file = None
        if "jsonl" in report_to:
            path = directory / METRICS_FILE
            _cut_torn_line(path)
            if reached is not None:
                _keep_lines(path, reached, evaluated)
            self._file = (directory / METRICS_FILE).open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records the metrics of one step: numbers (arrays of one element too), text or null.

        Raises:
            ValueError: If a metric is anything else.
        """
        values = {name: _to_scalar(name, value) for name, value in metrics.items()}
        nonfinite = [name for name, value in values.items() if not _is_finite(value)]
        if self._tensorboard is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        if self._file is not None:
            record = {"step": int(step)} | values | dict.fromkeys(nonfinite)
            if nonfinite:
                record["nonfinite"] = nonfinite
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the files; more than once does no harm."""
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def check_reporters(report_to: Sequence[str]) -> None:
    """Raises ValueError if TensorBoard is asked for and not installed."""
    if "tensorboard" in report_to:
        _import_tensorboard()


def _import_tensorboard() -> Any:
    try:
        import tensorboardX
    except ModuleNotFoundError as error:
        raise ValueError(
            "log.report_to names tensorboard, which is not installed: "
            "pip install 'lorax-train[tensorboard]', or remove it from log.report_to"
        ) from error
    return tensorboardX


def _cut_torn_line(path: Path) -> None:
    """Removes a last line that a killed run could not finish."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads a `metrics.jsonl`, without a last line that is still being written.

    Of a step that an older version wrote twice, when it resumed a run, the last line counts.

    Raises:
        ValueError: Naming the line that is not a JSON object with a step.
    """
    records: dict[tuple[int, bool], dict[str, Any]] = {}
    for _, record in _read_lines(Path(path)):
        key = record["step"], _is_evaluation(record)
        records.pop(key, None)
        records[key] = record
    return list(records.values())


def _read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yields each whole line and the record that it holds."""
    mend = "remove that line, or move the file away: it only tells how the run went"
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise ValueError(f"{path}: it cannot be read: {error.strerror}; move it away") from error
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "reason", None) or getattr(error, "msg", str(error)[:80])
            raise ValueError(f"{path}:{number}: not JSON: {reason}; {mend}") from None
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise ValueError(f"{path}:{number}: needs an object with a whole number `step`; {mend}")
        yield line, record


def _keep_lines(path: Path, reached: int, evaluated: bool) -> None:
    """Removes the lines of what comes again after step `reached`, all at once or not at all."""
    if not path.exists():
        return
    lines = 0
    kept = {}
    for line, record in _read_lines(path):
        lines += 1
        step = record["step"]
        is_evaluation = _is_evaluation(record)
        if step < reached or (step == reached and (evaluated or not is_evaluation)):
            kept.pop((step, is_evaluation), None)
            kept[step, is_evaluation] = line
    if len(kept) == lines:
        return
    write_file(path, b"".join(line + b"\n" for line in kept.values()))


def _is_evaluation(record: Mapping[str, Any]) -> bool:
    return "eval_loss" in record


def _to_scalar(name: str, value: Any) -> bool | int | float | str | None:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    item = value.item() if getattr(value, "size", 0) == 1 else value
    if isinstance(item, bool | int | float):
        return item
    raise ValueError(f"metric {name!r} needs one number, text or None, got {type(value).__name__}")


def _is_finite(value: bool | int | float | str | None) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
