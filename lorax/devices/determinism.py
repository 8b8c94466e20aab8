"""Programs that come to the same bits every time, on NVIDIA GPUs too.

Everything in a training step does so by itself but two things: cuDNN adds up the gradient of the
queries in whatever order its blocks end, and XLA picks products by timing them.
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
    """What is lowered inside, and compiled with those options, has attention that repeats.

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
    """Has jax ask `_marks`, of the thread that lowers, whenever it describes a backward pass."""
    # Private, as nothing public reaches it.
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
