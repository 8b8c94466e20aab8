"""What the hardware can do and hold: peaks of devices, memory of devices and process."""

import dataclasses
import fnmatch
import resource
import sys
from collections.abc import Sequence
from typing import Protocol

import jax

# Dense bfloat16 TFLOP/s with float32 accumulation, from NVIDIA's data sheets (half of the figure
# "with sparsity"), by the name the device gives itself.
PEAK_BF16_TFLOPS = {
    "NVIDIA B200": 2250.0,
    "NVIDIA H200": 989.5,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA GH200 *": 989.5,
    "NVIDIA H100 80GB HBM3": 989.5,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA A100[- ]*": 312.0,
    "NVIDIA A10": 125.0,
    "NVIDIA L40S": 362.05,
    "NVIDIA L40": 181.05,
    "NVIDIA L4": 121.0,
    "NVIDIA RTX 6000 Ada Generation": 364.2,
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 3090": 71.0,
}


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
    if "MIG" in device_kind:  # a slice of the device, of unknown size
        return None
    for name, peak in PEAK_BF16_TFLOPS.items():
        if fnmatch.fnmatchcase(device_kind, name):
            return peak
    return None


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
"""Of a device's nominal GiB: the rest is CUDA's own, and what lies between arrays."""


def device_gib() -> float | None:
    """Returns the memory that this process may use on its first device, or None if untold."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    limit = statistics.get("bytes_limit")
    return limit / GIB * USABLE if limit else None
