"""How far two computations of one thing may be apart: what rounding explains, and no more."""

import contextlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

EXACT = 1e-9
"""Relative distance in float64 that a fault exceeds and rounding does not reach.

A rounding is 1.1e-16. Small models amplify it up to ten thousand times, where a gradient is what is
left of terms that cancel; on CPUs with other vector units it is another rounding.
"""


@contextlib.contextmanager
def in_float64():
    """Has code that asks for `jnp.float32` while it runs compute in float64.

    What two computations of one thing differ by is then a fault, not their rounding. The dtype of
    the results should be asserted: float64 that is rounded to float32 on the way does not show.
    """
    with (
        jax.enable_x64(True),
        # Constants of numpy's are float32. It also keeps what is traced here from others: promotion
        # is part of the key of JAX's caches.
        jax.numpy_dtype_promotion("standard"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(jnp, "float32", jnp.float64)
        yield


def distance(got, want):
    """Returns ``‖got - want‖ / ‖want‖``, in float64."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def rounding(terms, condition=1.0, dtype=np.float32):
    """Returns the relative distance that rounding explains in a sum of `terms` products.

    ``4 · condition · √terms · u``: roundings go up as often as down, so that their squares add up.

    Args:
        terms: Products in a sum, or roundings in a row.
        condition: By how much what follows makes a relative error larger.
        dtype: Of the sums; u is half its spacing at 1.
    """
    return 4 * condition * math.sqrt(terms) * float(jnp.finfo(dtype).eps) / 2


def assert_equal_after_steps(got, want, steps):
    """Compares float32 values that were both rounded once in each of some steps."""
    allowed = steps * np.spacing(np.abs(want).max(), dtype=np.float32)
    np.testing.assert_allclose(got, want, rtol=0, atol=allowed)
