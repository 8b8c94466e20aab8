"""The bounds of the other tests: rounding stays below them, a lost term does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.bounds import EXACT, assert_equal_after_steps, distance, in_float64, rounding


@pytest.mark.parametrize("terms", [8, 256, 4096])
def test_the_order_of_a_sum_is_rounding_and_a_lost_term_is_not(terms):
    x, y = np.random.default_rng(0).normal(size=(2, 500, terms)).astype(np.float32)
    want = (x.astype(np.float64) * y).sum(axis=1)
    pairwise, one_by_one = (x * y).sum(axis=1), np.cumsum(x * y, axis=1)[:, -1]
    assert 0 < distance(pairwise, want) < distance(one_by_one, want) <= rounding(terms)
    assert distance(want - x[:, 0] * y[:, 0], want) > 10 * rounding(terms)
    # A factor that was rounded to bfloat16.
    assert distance(want * float(jnp.bfloat16(1 / 3)) * 3, want) > 10 * rounding(terms)


def test_values_of_many_steps_may_differ_by_their_roundings_and_not_by_a_decay():
    draw = np.random.default_rng(0)
    want = ours = theirs = draw.normal(size=100).astype(np.float32)
    want = want.astype(np.float64)
    for _ in range(20):
        update = (1e-2 * draw.normal(size=100)).astype(np.float32)
        want, ours = want - update, ours - update
        theirs = theirs - (update * np.float32(1 + 2**-20))
    assert distance(ours, theirs) > 0
    assert_equal_after_steps(ours, theirs, 20)
    assert_equal_after_steps(ours, want, 20)
    with pytest.raises(AssertionError):
        assert_equal_after_steps(ours * (1 - 1e-5), want, 20)


def test_what_asks_for_float32_is_computed_in_float64_and_only_inside():
    @jax.jit
    def root(x):
        return jnp.sqrt(x.astype(jnp.float32)) * np.float32(0.5)

    x = jnp.arange(1, 9)
    narrow = root(x)
    with in_float64():
        found = root(x)
    assert (narrow.dtype, found.dtype) == (np.float32, np.float64)
    want = np.sqrt(np.arange(1.0, 9)) / 2
    assert distance(found, want) < EXACT < distance(narrow, want)
    assert root(x).dtype == jnp.float32 == np.float32
