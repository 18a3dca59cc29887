"""Columns in turn."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.algorithms._columns import byte_of, Given, Grid, InTurn, round_columns
from jaxquant.algorithms._panels import panels
from jaxquant.numerics import E2M1, INT4, NF4, UINT3, UINT4

K, N = 48, 5


def _setting():
    rng = np.random.default_rng(0)
    factor = np.tril(rng.standard_normal((K, K))) / 8 + np.eye(K)
    return factor.astype(np.float32), rng.standard_normal((K, N)).astype(np.float32)


def _one_by_one(factor, w, scale):
    """In float64, from the last row to the first."""
    errors = np.zeros_like(w, np.float64)
    for i in reversed(range(K)):
        value = w[i] + factor[i + 1 :, i] @ errors[i + 1 :] / factor[i, i]
        errors[i] = w[i] - np.clip(np.round(value / scale[i]), -8, 7) * scale[i]
    return errors


@pytest.mark.parametrize("block", [3, 16, 128])
def test_columns_mend_what_those_before_left(block):
    factor, w = _setting()
    of_slot = np.arange(K) // 16
    scale = np.float32([[0.3], [0.2], [0.25]]) * np.ones((3, N), np.float32)
    given = Given(grids=Grid(scale=jnp.asarray(scale), zero=None), of_slot=jnp.asarray(of_slot))
    runs = panels(K, K, block)
    errors, codes, kept = round_columns(
        jnp.asarray(factor), jnp.asarray(w), panels=runs, format=INT4, by=given
    )
    wanted = _one_by_one(factor, w, scale[of_slot])
    np.testing.assert_allclose(errors, wanted, atol=1e-4)
    np.testing.assert_allclose(w - np.asarray(codes) * scale[of_slot], errors, atol=1e-6)
    assert kept is None


def test_groups_are_shown_their_columns_as_they_are_by_then():
    factor, w = _setting()
    seen = jnp.zeros((3, 16, N))

    def choose(turn, mended):
        return Grid(scale=jnp.full(N, 0.25), zero=None), mended

    errors, _, kept = round_columns(
        jnp.asarray(factor),
        jnp.asarray(w),
        panels=panels(K, 16, 32),
        format=INT4,
        by=InTurn(choose=choose, empty=seen),
    )
    np.testing.assert_array_equal(kept[0], w[32:])
    # At best: what the rest would be if none of it were rounded.
    for turn, low in ((1, 16), (2, 0)):
        rest, done = factor[: low + 16, : low + 16], factor[low + 16 :, : low + 16]
        best = w[: low + 16] + np.linalg.solve(rest.T, done.T @ np.asarray(errors)[low + 16 :])
        np.testing.assert_allclose(kept[turn], best[low:], atol=1e-3)


@pytest.mark.parametrize("format", [INT4, UINT3, UINT4, NF4, E2M1])
def test_codes_are_a_byte_each(format):
    grid = Grid(scale=jnp.ones(3), zero=None)
    values, codes = grid.nearest(jnp.asarray([-0.4, 0.0, 0.9]), format)
    assert codes.dtype == byte_of(format) and codes.dtype.itemsize == 1
    assert values.dtype == jnp.float32


def test_a_scale_of_zero_stands_for_zeros():
    values, codes = Grid(scale=jnp.zeros(2), zero=None).nearest(jnp.ones(2), INT4)
    np.testing.assert_array_equal(values, [0, 0])
    np.testing.assert_array_equal(codes, [0, 0])
