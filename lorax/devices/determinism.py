"""Programs that give the same bits every time, on NVIDIA GPUs too.

Two things in a training step do not by themselves: cuDNN adds up the gradient of the queries in the
order in which its blocks end, and XLA picks matmuls by timing them.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any

import jax

from lorax_kernels import xla_options

_REPEATABLE = {"xla_gpu_exclude_nondeterministic_ops": True, "xla_gpu_autotune_level": 0}

_marks: contextvars.ContextVar[bool] = contextvars.ContextVar("marks", default=False)


def compiler_options(full_determinism: bool) -> dict[str, bool | int] | None:
    """Returns XLA's options for a training step, or None where it has none of its own."""
    options = xla_options()
    return options | _REPEATABLE if options is not None and full_determinism else options


@contextlib.contextmanager
def repeatable_attention() -> Iterator[None]:
    """Programs lowered in this context and compiled with those options have repeatable attention.

    XLA 0.11.2 itself marks a backward pass of cuDNN where operations that do not repeat are
    excluded, but only the first of several equal ones, and then finds no program for the others
    (IndexError). So all are marked before it sees them.
    """
    if jax.default_backend() == "gpu":
        _mark_backward_passes()
    token = _marks.set(True)
    try:
        yield
    finally:
        _marks.reset(token)


@functools.cache
def _mark_backward_passes() -> None:
    """Patches jax to read `_marks`, of the lowering thread, when it describes a backward pass."""
    # Private: there is no public hook.
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    describe: Any = cudnn.create_dot_product_attention_backend_config_base

    @functools.wraps(describe)
    def marked(*arguments: Any, **named: Any) -> dict[str, Any]:
        described = describe(*arguments, **named)
        settings = described["cudnn_fmha_backend_config"]
        if _marks.get() and any(name.startswith("bmm1_grad") for name in settings):
            settings["force_deterministic"] = True
        return described

    cudnn.create_dot_product_attention_backend_config_base = marked
