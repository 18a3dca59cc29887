"""Peaks see every value, NaN included, however long the axes are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.numerics._scale import any_nan, peak

# Lengths below and above the steps in which flags are gathered, which divide them or do not.
SHAPES = [(1, 5), (7, 33), (3, 64), (2, 1024), (5, 1), (4, 6 * 32)]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nan_is_seen_wherever_it_is(shape, jit):
    rows, length = shape
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = jax.jit(peak, static_argnums=1) if jit else peak
    np.testing.assert_array_equal(found(jnp.asarray(x), 1)[:, 0], np.abs(x).max(1))
    for place in sorted({0, length // 3, length // 2, length - 1}):
        holed = x.copy()
        holed[rows // 2, place] = np.nan
        expected = np.arange(rows) == rows // 2
        np.testing.assert_array_equal(np.isnan(found(jnp.asarray(holed), 1)[:, 0]), expected)


def test_several_axes_and_none():
    x = jnp.zeros((3, 40, 4, 64)).at[1, 39, 2, 63].set(jnp.nan).at[2, 0, 0, 0].set(-5)
    flags = any_nan(x, (1, 3))
    assert flags.shape == (3, 1, 4, 1) and flags.sum() == 1 and bool(flags[1, 0, 2, 0])
    np.testing.assert_array_equal(peak(x, (-3, -1))[2, 0, :, 0], [5, 0, 0, 0])
    np.testing.assert_array_equal(any_nan(x, ()), jnp.isnan(x))


def test_infinities_and_signed_zeros():
    x = jnp.asarray([[jnp.inf, -1.0], [-jnp.inf, jnp.inf], [-0.0, -0.0]])
    np.testing.assert_array_equal(peak(x, 1)[:, 0], [np.inf, np.inf, 0.0])
