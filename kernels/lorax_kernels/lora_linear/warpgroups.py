"""The frame of every kernel here: one warpgroup feeds a ring of copies, and two multiply."""

from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from lorax_kernels.device import core_count

REGISTERS = (232, 40)  # per thread that multiplies and that feeds: 2·m + f fit 64 Ki registers


def launch(body, name: str, outputs, scratch, sms: int | None, cluster: int = 1):
    """Returns a function that runs a kernel, persistent on the device.

    Args:
        body: ``body(*refs, **scratch)``.
        name: The kernel's name in profiles.
        outputs: Types of the results.
        scratch: Shared memory and barriers.
        sms: CTAs; None asks the device.
        cluster: CTAs that copy together.
    """
    body.__name__ = name
    clusters = {"cluster": (cluster,), "cluster_names": ("cluster",)} if cluster > 1 else {}
    return plgpu.kernel(
        body,
        out_type=outputs,
        grid=((sms or core_count()) // cluster,),
        grid_names=("sm",),
        **clusters,
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True
        ),
    )


def divide(
    feed: Callable[[], None], multiply: Callable[[], None], registers: tuple[int, int] = REGISTERS
) -> None:
    """Runs `feed` on the third warpgroup and `multiply` on the others, with registers to match."""

    def feeding():
        plgpu.set_max_registers(registers[1], action="decrease")
        feed()

    def multiplying():
        plgpu.set_max_registers(registers[0], action="increase")
        multiply()

    lax.cond(lax.axis_index("warpgroup") == 2, feeding, multiplying)


def drain(total, slots: int, empty: Any, slot_of: Callable[[Any], Any]) -> None:
    """Waits until a ring's last slots are read, so that every barrier ends in a phase seen.

    Args:
        total: Steps that went through the ring.
        slots: Slots of the ring.
        empty: Its barriers.
        slot_of: Step → slot.
    """
    left = jnp.minimum(total, slots)

    @pl.loop(0, left)
    def _(i):
        plgpu.barrier_wait(empty.at[slot_of(total - left + i)])
