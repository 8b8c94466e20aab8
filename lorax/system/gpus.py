"""GPUs by NVIDIA's data sheets: memory, matmul rate and bandwidth."""

import fnmatch
import re
from typing import NamedTuple

from lorax.system.wording import did_you_mean, show


class Gpu(NamedTuple):
    """A kind of GPU.

    Attributes:
        name: Short, as `lorax plan --gpu` takes it.
        title: Long.
        kind: Pattern of the name that the device gives itself.
        gb: Memory by its data sheet.
        gib: Memory as the driver shows it, in GiB; where it is GDDR6 with ECC, a sixteenth less.
        tflops: Dense bfloat16 products with float32 sums: half of the figure "with sparsity".
        tb_per_s: Of its memory.
        host_gb_per_s: Each way between it and the host, as copies reach it.
        is_hopper: Whether lorax's kernels run there.
    """

    name: str
    title: str
    kind: str
    gb: int
    gib: float
    tflops: float
    tb_per_s: float
    host_gb_per_s: float = 26.0
    is_hopper: bool = False


H200 = Gpu("h200", "NVIDIA H200", "NVIDIA H200", 141, 140.4, 989.5, 4.8, 55.0, True)
"""The one that was measured."""

GPUS = (
    Gpu("b200", "NVIDIA B200", "NVIDIA B200", 180, 179.0, 2250.0, 8.0, 55.0),
    H200,
    Gpu("h200-nvl", "NVIDIA H200 NVL", "NVIDIA H200 NVL", 141, 140.4, 835.5, 4.8, 55.0, True),
    Gpu("gh200", "NVIDIA GH200", "NVIDIA GH200 *", 96, 95.5, 989.5, 4.0, 55.0, True),
    Gpu("h100", "NVIDIA H100", "NVIDIA H100 80GB HBM3", 80, 79.6, 989.5, 3.35, 55.0, True),
    Gpu("h100-nvl", "NVIDIA H100 NVL", "NVIDIA H100 NVL", 94, 93.5, 835.5, 3.9, 55.0, True),
    Gpu("h100-pcie", "NVIDIA H100 PCIe", "NVIDIA H100 PCIe", 80, 79.6, 756.5, 2.0, 55.0, True),
    Gpu("a100", "NVIDIA A100", "NVIDIA A100[- ]*80GB*", 80, 80.0, 312.0, 2.0),
    Gpu("a100-40gb", "NVIDIA A100", "NVIDIA A100[- ]*", 40, 40.0, 312.0, 1.555),
    Gpu("a40", "NVIDIA A40", "NVIDIA A40", 48, 45.0, 149.7, 0.696),
    Gpu("a10", "NVIDIA A10", "NVIDIA A10", 24, 22.5, 125.0, 0.6),
    Gpu("l40s", "NVIDIA L40S", "NVIDIA L40S", 48, 45.0, 362.05, 0.864),
    Gpu("l40", "NVIDIA L40", "NVIDIA L40", 48, 45.0, 181.05, 0.864),
    Gpu("l4", "NVIDIA L4", "NVIDIA L4", 24, 22.5, 121.0, 0.3),
    Gpu("6000-ada", "RTX 6000 Ada", "NVIDIA RTX 6000 Ada Generation", 48, 48.0, 364.2, 0.96),
    Gpu("a6000", "RTX A6000", "NVIDIA RTX A6000", 48, 48.0, 154.8, 0.768),
    Gpu("5090", "RTX 5090", "NVIDIA GeForce RTX 5090", 32, 31.8, 209.5, 1.792, 55.0),
    Gpu("4090", "RTX 4090", "NVIDIA GeForce RTX 4090", 24, 24.0, 165.2, 1.008),
    Gpu("3090", "RTX 3090", "NVIDIA GeForce RTX 3090", 24, 24.0, 71.0, 0.936),
)


def gpu_of(device_kind: str) -> Gpu | None:
    """Returns the GPU that a device says it is, or None if it is not in the table."""
    if "MIG" in device_kind:  # a slice of the device, of unknown size
        return None
    found = (gpu for gpu in GPUS if fnmatch.fnmatchcase(device_kind, gpu.kind))
    return next(found, None)


def find_gpu(name: str) -> Gpu:
    """Returns the GPU of a name, as `h100`, `RTX 4090`, or as the device says it.

    Raises:
        ValueError: Naming those that are known.
    """
    sized = {_plain(f"{gpu.title} {gpu.gb}GB"): gpu for gpu in GPUS}
    named = {_plain(gpu.title): gpu for gpu in GPUS} | {_plain(gpu.name): gpu for gpu in GPUS}
    found = gpu_of(name) or (sized | named).get(_plain(name))
    if found is None:
        known = [gpu.name for gpu in GPUS]
        hint = did_you_mean(_plain(name), known)
        raise ValueError(f"{show(name)} is not in the table of GPUs{hint}: {', '.join(known)}")
    return found


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|rtx|[^a-z0-9]", "", name.lower())
