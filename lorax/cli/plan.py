"""`lorax plan`: memory and time of a run, before it."""

import jax
from rich.console import Console

from lorax.cli.common import read_config
from lorax.report.overview import report_notes
from lorax.report.plan import Target, report_plan
from lorax.runs.memory import make_planner
from lorax.runs.model import Blueprint
from lorax.system.gpus import H200, find_gpu
from lorax.system.hardware import USABLE, device_gib, local_gpu


def plan(parsed, console: Console) -> None:
    """Shows what each policy takes on a GPU, and what fits it."""
    target = choose_gpu(parsed.gpu)
    config = read_config(parsed, console)
    blueprint = Blueprint.of(config)
    report_plan(console, config, target, lambda gpu: make_planner(blueprint, gpu))
    report_notes(console, blueprint.architecture.notes)


def choose_gpu(asked: str | None) -> Target:
    """Returns the GPU that is asked for, or the one here, or the one that was measured."""
    if asked is not None:
        try:
            gpu = find_gpu(asked)
        except ValueError as error:
            raise ValueError(f"--gpu: {error}") from None
        return Target(gpu, gpu.gib * USABLE, "as asked")
    gib = device_gib() if jax.default_backend() == "gpu" else None
    if gib is None:
        reason = "the default where there is none (--gpu NAME: another)"
        return Target(H200, H200.gib * USABLE, reason)
    if (gpu := local_gpu()) is not None:
        return Target(gpu, gib, "the one here (--gpu NAME: another)")
    kind = jax.local_devices()[0].device_kind
    unknown = H200._replace(title=kind, gb=round(gib / USABLE))
    return Target(unknown, gib, "the one here; its speed is not known, so times are an H200's")
