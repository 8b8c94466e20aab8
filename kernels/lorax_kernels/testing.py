"""Running the GPU kernels on a CPU: interpreted, with every race between threads recorded."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
from jax._src import callback
from jax._src.dispatch import runtime_tokens
from jax._src.interpreters import pxla
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call, shared_memory

from lorax_kernels.device import interpreted

# What is interpreted runs once, so that optimizing it costs more than it saves.
_QUICKLY = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 1,
    "xla_disable_hlo_passes": "fusion,fusion-wrapper",
}


@dataclass
class Races:
    """What the interpreter saw."""

    def found(self) -> bool:
        """Says whether two threads touched one place without an order between them.

        It waits for the kernels that were called: one that is still running has shown nothing.
        """
        jax.effects_barrier()
        return bool(interpret_pallas_call.get_races().races_found)


@contextlib.contextmanager
def _quickly() -> Iterator[None]:
    """Leaves out, of what JAX does with an interpreted kernel, what takes most of the time.

    XLA optimizes nothing: JAX takes options for one function only, and the interpreter has many.
    And what the kernel tells the interpreter, in thousands of calls of ten numbers each, comes as
    NumPy's arrays and is not put on a device first, only to be read again. What a thread runs is
    traced and looked up once, not by every thread of every block.
    """
    create: Any = pxla.create_compile_options
    number = shared_memory._to_int

    def create_quick(*given: Any) -> Any:
        *others, options = given
        return create(*others, _QUICKLY | options)

    def call_quick(*args: Any, callback: Any, **_: Any) -> Any:
        results = callback(*(np.array(arg) for arg in args))  # XLA takes its memory back
        return jax.tree.map(np.asarray, results)

    compiled: dict[int, tuple[Any, Any]] = {}
    lock = threading.Lock()

    def run_compiled(jaxpr: Any, consts: Any, *args: Any) -> None:
        with lock:
            if id(jaxpr) not in compiled:
                run = jax.jit(thread_map._run, static_argnums=(0,))
                compiled[id(jaxpr)] = jaxpr, run.trace(jaxpr, consts, *args).lower().compile()
        compiled[id(jaxpr)][1](consts, *args)

    with (
        mock.patch.object(thread_map, "_run_jaxpr", run_compiled),
        mock.patch.object(pxla, "create_compile_options", create_quick),
        mock.patch.object(callback, "io_callback_impl", call_quick),
        mock.patch.object(
            shared_memory, "_to_int", lambda x: int(x) if isinstance(x, np.ndarray) else number(x)
        ),
    ):
        yield


@contextlib.contextmanager
def interpret(cores: int = 3) -> Iterator[Races]:
    """Interprets Mosaic GPU kernels on the CPU, as on a device with `cores` multiprocessors.

    Run one kernel at a time: several in one compiled function run at once and wait for each other's
    threads for ever. `lora_linear` compiles several together; call what its jitted parts wrap.

    What it does not see: products of the matrix units run at once, so a ring slot that is freed
    while its product is still running goes unnoticed.
    """
    interpret_pallas_call.reset_gpu_interpret_mode_state()
    try:
        with (
            interpreted(cores),
            _quickly(),
            plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)),
        ):
            yield Races()
            jax.effects_barrier()  # a kernel that still runs needs the state that goes now
    finally:
        runtime_tokens.clear()  # one of a kernel that failed would fail the next kernel
        interpret_pallas_call.reset_gpu_interpret_mode_state()
