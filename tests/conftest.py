"""Strictness for the whole suite: no silent promotion, float32 means float32, no network."""

import atexit
import gc
import math
import os
import re
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
# The tests' processes share the cores: threads of a product's own would wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Four virtual devices, so that sharded runs are tested on any machine; the last flag counts.
os.environ.update(
    XLA_FLAGS=f"--xla_force_host_platform_device_count=4 {os.environ.get('XLA_FLAGS', '')}".strip()
)

# The processes of one run of the tests, and those that they start, compile each program once.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="lorax-tests-")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import jax.numpy as jnp
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
_KEPT_FROM = "jax_persistent_cache_min_compile_time_secs"
_SECONDS = getattr(jax.config, _KEPT_FROM)


def _has_gpu() -> bool:
    return any(device.platform == "gpu" for device in jax.devices())


def pytest_runtest_setup(item):
    """Sets how the programs of a test, and of the fixtures made for it, are compiled.

    Most run for less time than LLVM would take to optimize them; not so what is compiled as a
    user's programs are. A kernel is not kept: it calls back into the process that compiled it.
    """
    is_kernel = item.path.name.startswith("test_kernel_")
    optimized = _has_gpu() or item.get_closest_marker("as_shipped") is not None
    jax.config.update(_KEPT_FROM, math.inf if is_kernel else _SECONDS)
    jax.config.update("jax_disable_most_optimizations", not optimized)


def _makes_float16():
    """Says whether XLA compiles float16 for this device: not for a CPU without F16C."""
    try:
        jnp.square(jnp.ones(8, jnp.float16))
    except jax.errors.JaxRuntimeError:
        return False
    return True


def pytest_collection_finish():
    """Spares the garbage collector the modules and tests, which stay to the end."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Skips what needs a GPU or float16 where there is none."""
    in_float16 = [item for item in items if re.search(r"(?<!b)float16", item.name)]
    if in_float16 and not _makes_float16():
        for item in in_float16:
            item.add_marker(pytest.mark.skip(reason="XLA compiles no float16 for this CPU"))
    if _has_gpu():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
