"""Choosing the recomputation of the backward pass; advice when memory or disk is full."""

import contextlib
import errno
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from lorax.config.run import RunConfig
from lorax.models.stack.recompute import Recomputation
from lorax.planning.memory import POLICIES, Planner
from lorax.recovery.identity import Identity
from lorax.recovery.store import CHECKPOINT_FOLDER, CheckpointStore, SaveError
from lorax.runs.model import Blueprint
from lorax.system.gpus import H200, Gpu
from lorax.system.hardware import GIB, device_gib, local_gpu


class OutOfMemoryError(RuntimeError):
    """A step that did not fit the device, with settings that would."""


def make_planner(blueprint: Blueprint, gpu: Gpu | None = None) -> Planner:
    """Returns the planner of a run, which needs no weights.

    Args:
        blueprint: Of the run's model.
        gpu: That it is for; if not given, the one here, or an H200 where that is not known.
    """
    gpu = gpu or local_gpu() or H200
    return Planner(blueprint.config, blueprint.architecture, blueprint.shapes, gpu)


def choose_recomputation(
    blueprint: Blueprint, before: Recomputation | None = None
) -> tuple[Recomputation, str]:
    """Returns the recomputation of the backward pass, and the reason for it.

    `auto` is the fastest that fits. A resumed run keeps its recomputation, because another one
    would change its bits.

    Args:
        blueprint: The run's model.
        before: The recomputation of a run that is resumed.

    Raises:
        ValueError: If `train.memory_gib` is too little.
    """
    config = blueprint.config
    train = blueprint.config.train
    if train.gradient_checkpointing != "auto":
        kept = 1 if train.kept_layers is None else train.kept_layers
        return Recomputation(train.gradient_checkpointing, kept), "as asked"
    gib = train.memory_gib or device_gib()
    if gib is None:
        kind = jax.devices()[0].device_kind
        return before or Recomputation("none"), f"{kind} does not report its memory"
    planner = make_planner(blueprint)
    shape = train.per_device_train_batch_size, config.data.max_seq_length

    def peak_of(r):
        return planner.memory(r.policy, *shape, r.kept_layers).peak / GIB

    if before is not None:
        reason = f"as before, about {peak_of(before):.3g} of {gib:.3g} GiB"
        if peak_of(before) > gib and train.memory_gib:
            raise ValueError(
                f"train.memory_gib: {gib:g} is less than the run in {config.save.output_dir} takes "
                f"by the estimate: {peak_of(before):.3g} for {before}; raise it, or leave it out"
            )
        return before, reason
    choice = planner.fastest(*shape, gib)
    peak = peak_of(choice)
    if peak > gib:
        found = f"no policy fits: {choice} takes the least, about {peak:.3g} GiB of {gib:.3g}"
        if train.memory_gib:
            raise ValueError(
                f"train.memory_gib: {found}; lower train.per_device_train_batch_size or "
                "data.max_seq_length (`lorax plan` shows what fits), or raise it"
            )
        return choice, f"{found}, by the estimate of `lorax plan`"
    reason = f"about {peak:.3g} of {gib:.3g} GiB, the fastest that fits"
    if host := planner.host_bytes(choice.policy, *shape, choice.kept_layers) / GIB:
        reason += f", and {host:.1f} GiB of the host's memory per device"
    return choice, reason


def saved_manifest(config: RunConfig) -> Mapping[str, Any] | None:
    """Returns the manifest of the newest checkpoint in `save.output_dir`, if there is one."""
    return CheckpointStore(Path(config.save.output_dir) / CHECKPOINT_FOLDER).newest_manifest()


def recomputed_before(config: RunConfig) -> Recomputation | None:
    """Returns the recomputation of the run in `save.output_dir`, if `auto` resumes one there."""
    if config.train.gradient_checkpointing != "auto":
        return None
    return recomputed_in(Identity(saved_manifest(config)))


def recomputed_in(identity: Identity) -> Recomputation | None:
    """Returns the recomputation recorded in the checkpoint of a run."""
    text = identity.saved.get("gradient checkpointing")
    return None if text is None else Recomputation.read(text)


def explain_memory(blueprint: Blueprint, recomputation: Recomputation, error: Exception) -> str:
    """Returns the settings to change when the device's memory was too small."""
    train = blueprint.config.train
    length = blueprint.config.data.max_seq_length
    rows = train.per_device_train_batch_size
    planner = make_planner(blueprint)
    gib = train.memory_gib or device_gib() or 0.0
    line = str(error).splitlines()[0]
    if not gib:
        return f"out of memory: {line}. `lorax plan` shows what takes less"
    moves = []
    kept = recomputation.kept_layers
    now = planner.memory(recomputation.policy, rows, length, kept).peak
    without = "" if train.kept_layers is None else " without train.kept_layers"
    for other in POLICIES:
        peak = planner.memory(other, rows, length).peak
        if peak < now:
            about = f"{without} (about {peak / GIB:.1f} GiB)"
            moves.append(f"train.gradient_checkpointing: {other}{about}")
    if spared := planner.spared_by_host:
        moves.append(f"model.offload_embedding: true ({spared / GIB:.1f} GiB less)")
    smallest = min(POLICIES, key=lambda policy: planner.memory(policy, 1, length).peak)
    if (most := planner.largest_batch(smallest, length, gib)) and most < rows:
        moves.append(f"train.per_device_train_batch_size: {most} with `{smallest}`{without}")
    if not moves:
        longest = planner.longest_sequence(smallest, 1, gib)
        moves.append(f"data.max_seq_length: {longest} with one row and `{smallest}`{without}")
    found = "; ".join(moves)
    return f"out of memory: {line}. By the estimate of `lorax plan` these take less: {found}"


_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


@contextlib.contextmanager
def memory_explained(config: RunConfig) -> Iterator[None]:
    """Raises `OutOfMemoryError`, which names what would fit, instead of XLA's error."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        blueprint = Blueprint.of(config)
        recomputation, _ = choose_recomputation(blueprint, recomputed_before(config))
        raise OutOfMemoryError(explain_memory(blueprint, recomputation, error)) from error


@contextlib.contextmanager
def disk_explained(config: RunConfig) -> Iterator[None]:
    """Raises `SaveError`, which names what is safe, instead of the error of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        output = Path(config.save.output_dir)
        steps = CheckpointStore(output / CHECKPOINT_FOLDER).steps()
        safe = f"step {steps[-1]} is the newest checkpoint" if steps else "no checkpoint was saved"
        raise SaveError(
            f"{error.filename or output}: {error.strerror}; {safe}. When that is fixed, go on "
            "with --resume auto"
        ) from error
