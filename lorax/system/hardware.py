"""The hardware at hand: peaks of devices, memory of devices and process."""

import dataclasses
import resource
import sys
from collections.abc import Sequence
from typing import Protocol

import jax

from lorax.system.gpus import Gpu, gpu_of


class Device(Protocol):
    """What is read of a `jax.Device`."""

    @property
    def device_kind(self) -> str:
        """Name of the hardware."""
        ...

    def memory_stats(self) -> dict[str, int] | None:
        """Byte counts, or None where the backend keeps none."""
        ...


def peak_bf16_tflops(device_kind: str) -> float | None:
    """Returns the dense bfloat16 peak of a device in TFLOP/s, or None if it is not in the table."""
    gpu = gpu_of(device_kind)
    return None if gpu is None else gpu.tflops


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """Peak memory in GiB, and whose: `device`, or `process` where the device does not tell."""

    gib: float
    source: str


def memory_gib(devices: Sequence[Device] | None = None) -> MemoryUse:
    """Returns the highest peak of the local devices, else the peak resident size of the process."""
    devices = jax.local_devices() if devices is None else devices
    statistics = [device.memory_stats() for device in devices]
    peaks = [entry["peak_bytes_in_use"] for entry in statistics if entry]
    if peaks:
        return MemoryUse(max(peaks) / 2**30, "device")
    # getrusage counts KiB, on macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return MemoryUse(peak / 2**30, "process")


GIB = 2.0**30

USABLE = 0.95
"""Of a device's GiB: the rest is CUDA's own, and what lies between arrays."""


def local_gpu() -> Gpu | None:
    """Returns what this process's first device is, or None if it is in no table."""
    return gpu_of(jax.local_devices()[0].device_kind)


def device_gib() -> float | None:
    """Returns the memory that this process may use on its first device, or None if untold."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    limit = statistics.get("bytes_limit")
    return limit / GIB * USABLE if limit else None
