"""Running the GPU kernels on a CPU: interpreted, with every race between threads recorded."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax._src.dispatch import runtime_tokens
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call

from lorax_kernels.device import interpreted
from tests.kernels.evaluation import evaluate


@dataclass
class Races:
    """What the interpreter saw."""

    def found(self) -> bool:
        """Says whether two threads touched one place without an order between them.

        It waits for the kernels that were called: one that is still running has shown nothing.
        """
        jax.effects_barrier()
        return bool(interpret_pallas_call.get_races().races_found)


def _run_thread(jaxpr, constants, *arguments) -> None:
    """Runs one thread of a kernel, in place of what compiles it for XLA first."""
    try:
        evaluate(jaxpr, arguments, constants)
    except Exception as error:
        # Threads that wait for this one end too.
        gpu_callbacks.fail(error, thread_map.NESTED_TOKEN_VALUE)
        raise


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
            plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)),
            mock.patch.object(thread_map, "_run_jaxpr", _run_thread),
        ):
            yield Races()
            jax.effects_barrier()  # a kernel that still runs needs the state that goes now
    finally:
        runtime_tokens.clear()  # one of a kernel that failed would fail the next kernel
        interpret_pallas_call.reset_gpu_interpret_mode_state()
