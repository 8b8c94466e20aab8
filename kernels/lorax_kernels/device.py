"""The device that programs are compiled for."""

import contextlib
import contextvars
import functools
import importlib.util
from collections.abc import Iterator

import jax
import jax.numpy as jnp

HOPPERS = ("H100", "H200", "H800", "GH200", "H20")

# Matmuls through cuBLAS, which folds a sum into the matmul; no merging of matmuls that share an
# operand, because that concatenates their weights in every call.
CUBLAS_ONLY = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}

# XLA 0.11.2 compiles and times several variants of each of the hundreds of fusions of a step. Where
# both were measured, one billion parameters and 512 tokens, the step was slower with its choices.
NO_TRIALS = {"xla_gpu_experimental_enable_fusion_autotuner": False}

_interpreted_cores: contextvars.ContextVar[int] = contextvars.ContextVar("cores", default=0)


@contextlib.contextmanager
def interpreted(cores: int) -> Iterator[None]:
    """Interprets kernels on the CPU within the block, as if it had `cores` multiprocessors."""
    token = _interpreted_cores.set(cores)
    try:
        yield
    finally:
        _interpreted_cores.reset(token)


def is_interpreted() -> bool:
    """Says whether kernels are interpreted on the CPU."""
    return bool(_interpreted_cores.get())


def device_kind() -> str:
    """Returns the kind of the device."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    return abstract.device_kind if abstract is not None else jax.devices()[0].device_kind


def core_count() -> int:
    """Returns the number of multiprocessors."""
    if cores := _interpreted_cores.get():
        return cores
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None and abstract.num_cores:
        return abstract.num_cores
    return jax.devices()[0].core_count


def runs_kernels() -> bool:
    """Says whether the device has compute capability 9 (wgmma, nothing newer), or is emulated."""
    if is_interpreted():
        return True
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return any(name in abstract.device_kind for name in HOPPERS)
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    return device.platform == "gpu" and capability.split(".")[0] == "9"


@functools.cache
def has_triton() -> bool:
    """Says whether JAX comes with Pallas's Triton, which it calls deprecated."""
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


def load_runtime() -> None:
    """Registers the library that compiled kernels call; call it before loading such a program."""
    import jax.experimental.mosaic.gpu  # noqa: F401  (tells jaxlib where its library is)


def compile_kernels(where: jax.sharding.Sharding | None = None) -> int:
    """Compiles the kernels that were lowered so far, and returns how many there are.

    Each is compiled once in a process, by name of its code. XLA compiles them one after another
    when it emits the program around them, after all other passes. Called in a background thread
    meanwhile, this function has them ready by then: some 28 for a step, half a second each.

    Args:
        where: Another device than JAX's own to compile for.
    """
    from jax.experimental.mosaic.gpu.core import KNOWN_KERNELS

    call = jax.ffi.ffi_call("mosaic_gpu_v2", jax.ShapeDtypeStruct((1,), jnp.float32))
    rest = ("use_custom_barrier", "skip_device_barrier", "uses_xla_collective_metadata")
    kernels = [
        {"kernel_hash": name, "module": code, **dict.fromkeys(rest, False)}
        for name, code in list(KNOWN_KERNELS.items())
    ]

    # Never run: it has no operands for the kernels.
    @functools.partial(jax.jit, out_shardings=where)
    def call_all():
        return [call(**kernel) for kernel in kernels]

    if kernels:
        call_all.trace().lower(lowering_platforms=("cuda",)).compile()
    return len(kernels)


def xla_options() -> dict[str, bool | int] | None:
    """Returns the compiler options with which XLA's part of a step is fastest, or None."""
    return CUBLAS_ONLY | NO_TRIALS if jax.default_backend() == "gpu" else None
