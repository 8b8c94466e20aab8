"""What a run measures: a JSON line per step, tokens per second, model FLOPs, memory, versions."""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax

from lorax.system.hardware import Device, peak_bf16_tflops

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
            evaluated: Whether the evaluation of that step stays too, or is made again.

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
    lines, kept = 0, {}
    for line, record in _read_lines(path):
        lines += 1
        step, is_evaluation = record["step"], _is_evaluation(record)
        if step < reached or (step == reached and (evaluated or not is_evaluation)):
            kept.pop((step, is_evaluation), None)
            kept[step, is_evaluation] = line
    if len(kept) == lines:
        return
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.writelines(line + b"\n" for line in kept.values())
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What the FLOPs of a model depend on.

    Attributes:
        frozen_parameters: Entries of frozen weight matrices, without an embedding table that is
            only looked up (a tied one is the head's matrix and counts).
        trained_parameters: Entries of trained weight matrices: the adapter's, or all.
        layers: Number of layers.
        attention_width: Heads times head dimension.
    """

    frozen_parameters: int
    trained_parameters: int
    layers: int
    attention_width: int

    def flops_per_token(self, context_tokens: float) -> float:
        """Returns ``4·N_frozen + 6·N_trained + 12·L·H·T``, forward and backward pass.

        A trained matrix takes 2 FLOPs per entry forward, 2 for the gradient of its input and 2 for
        its own; a frozen one has no gradient of its own. Attention has no weights, so it costs the
        same in both; like in the source, nothing is taken off for its causal half, and what is
        recomputed does not count.

        Args:
            context_tokens: T, the length of the documents.

        Source: Chowdhery et al. 2022, "PaLM", appendix B, https://arxiv.org/abs/2204.02311
        """
        matrices = 4 * self.frozen_parameters + 6 * self.trained_parameters
        return matrices + 12 * self.layers * self.attention_width * context_tokens


class Throughput:
    """Tokens per second and model FLOPs utilisation of a run, without the steps that compile."""

    def __init__(self, size: ModelSize, devices: Sequence[Device] | None = None):
        """Takes the devices of the run; all of this process's backend when not given."""
        devices = jax.devices() if devices is None else devices
        peaks = [peak_bf16_tflops(device.device_kind) for device in devices]
        self.size, self.devices = size, devices
        self.peak_flops = None if None in peaks else 1e12 * sum(filter(None, peaks))
        self._steps = 0
        self._tokens = 0
        self._seconds = 0.0
        self._flops = 0.0

    def add(
        self, tokens: int, seconds: float, *, context_tokens: float, compiled: bool = False
    ) -> dict[str, float | None]:
        """Counts one step; the first one, and those that are `compiled`, do not enter the mean.

        Args:
            tokens: Tokens of the step on all devices, without padding.
            seconds: How long the step took, its result waited for.
            context_tokens: Mean length of the documents of the step.
            compiled: Whether the step was compiled within `seconds`.

        Returns:
            The step's own `tokens_per_s` and `mfu` (None where the device's peak is unknown).
        """
        if seconds <= 0:
            raise ValueError(f"a step needs seconds > 0, got {seconds}")
        flops = tokens * self.size.flops_per_token(context_tokens)
        if self._steps > 0 and not compiled:
            self._tokens += tokens
            self._seconds += seconds
            self._flops += flops
        self._steps += 1
        return {"tokens_per_s": tokens / seconds, "mfu": self._mfu(flops, seconds)}

    def mean(self) -> dict[str, float | None]:
        """Returns `tokens_per_s` and `mfu` of all counted steps; None before there is one."""
        if self._seconds == 0.0:
            return {"tokens_per_s": None, "mfu": None}
        speed = self._tokens / self._seconds
        return {"tokens_per_s": speed, "mfu": self._mfu(self._flops, self._seconds)}

    def _mfu(self, flops: float, seconds: float) -> float | None:
        return None if self.peak_flops is None else flops / (seconds * self.peak_flops)


def is_spike(loss: float, before: Sequence[float]) -> bool:
    """Says whether a loss stands out: six standard deviations and a tenth above the mean.

    Args:
        loss: Of a step.
        before: Of the steps before it; of fewer than twenty nothing is said.
    """
    if not math.isfinite(loss) or len(before) < 20:
        return False
    mean = sum(before) / len(before)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in before) / len(before))
    return loss > mean + 6 * deviation and loss > 1.1 * mean
