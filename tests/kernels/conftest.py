"""Interpreted kernels run one at a time."""

import jax
import pytest

from lorax_kernels.lora_linear import calls


@pytest.fixture
def one_after_the_other():
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    yield
    jax.config.update("jax_cpu_enable_async_dispatch", True)


@pytest.fixture
def one_kernel_at_a_time(one_after_the_other, monkeypatch):
    # Interpreted kernels of one compiled function would run side by side, and wait for each other.
    for name, value in list(vars(calls).items()):
        if hasattr(value, "lower") and hasattr(value, "__wrapped__"):
            monkeypatch.setattr(calls, name, value.__wrapped__)
