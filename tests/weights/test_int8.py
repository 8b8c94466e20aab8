"""int8 per output column: the definition, in NumPy, and its rounding."""

import jax.numpy as jnp
import numpy as np
import pytest

from lorax.weights.int8 import INT8
from lorax_kernels.weights.int8 import quantise


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_codes_are_within_half_a_step_and_values_are_rounded_once(dtype):
    matrix = np.random.default_rng(0).standard_normal((32, 8)).astype(np.float32)
    matrix[:, 3] = 0
    narrow = jnp.asarray(matrix, dtype)
    stored = quantise(narrow)
    wide = np.asarray(narrow, np.float64)
    codes = np.asarray(stored.codes, np.float64)
    scale = np.asarray(stored.scale)
    np.testing.assert_allclose(scale, np.abs(wide).max(0) / 127, rtol=1e-6)
    assert (np.abs(codes * scale - wide) <= scale * (0.5 + 1e-4)).all()
    assert not codes[:, 3].any()
    want = jnp.asarray(codes.astype(np.float32) * scale).astype(dtype)
    np.testing.assert_array_equal(np.asarray(stored.dense()), np.asarray(want))


def test_ties_go_to_even_numbers():
    column = jnp.asarray([127, 0.5, 1.5, 2.5, -0.5, -1.5], jnp.float32)[:, None]
    assert np.asarray(quantise(column).codes)[:, 0].tolist() == [127, 0, 2, 2, 0, -2]


def test_bytes_are_those_of_the_stored_arrays():
    stored = INT8.store(jnp.ones((32, 8), jnp.bfloat16))
    assert INT8.bytes((32, 8), jnp.bfloat16) == stored.codes.nbytes + stored.scale.nbytes
