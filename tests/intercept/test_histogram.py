"""Histograms: exact merging, percentiles to a stated resolution, ranges that err least."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

import jaxquant as jq
from jaxquant.intercept import Histogram
from jaxquant.intercept._histogram import LIMB

FULL, SMALL = Histogram(), Histogram(per_octave=4, octaves=3)
EDGES = (0.0, -0.0, 1.0, -1.0, 2.0**-149, -(2.0**-126), 2.0**127, -(2.0**-10), float(2**24 - 1))
floats = st.one_of(
    st.sampled_from(EDGES), st.floats(width=32, allow_nan=False, allow_infinity=False)
)
SMALL_MEASURE = jax.jit(SMALL.measure)


def _rows(values):
    return jnp.asarray(np.asarray(values, np.float32)[:, None])


def _equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


@given(st.lists(st.lists(floats, min_size=4, max_size=4), min_size=3, max_size=3))
def test_merging_is_exact_and_associative(parts):
    a, b, c = (SMALL_MEASURE(_rows(part)) for part in parts)
    want = SMALL_MEASURE(_rows(sum(parts, [])))
    _equal(SMALL.merge(SMALL.merge(a, b), c), want)
    _equal(SMALL.merge(a, SMALL.merge(c, b)), want)


def test_bins_by_hand():
    """Octaves [0.5, 1), [1, 2) and [2, 4), of 4 bins each; one bin below."""
    found = SMALL.measure(_rows([3.9, 2.0, 1.25, 0.5, 0.49, 0.0, -0.7, -3.0]))
    counts = np.asarray(found["counts"])
    assert counts.shape == (2, 13, 2) and not counts[..., 1].any()
    below, above = counts[..., 0]
    assert {i: int(n) for i, n in enumerate(above) if n} == {0: 2, 1: 1, 6: 1, 9: 1, 12: 1}
    assert {i: int(n) for i, n in enumerate(below) if n} == {2: 1, 11: 1}
    assert int(found["top"]) - 127 == 1
    assert (float(found["low"]), float(found["high"])) == (-3.0, np.float32(3.9))
    seen, often = SMALL.sample(found)
    assert (np.diff(seen) >= 0).all() and often.sum() == 8
    np.testing.assert_array_equal(
        np.repeat(seen, often.astype(int)), [-3.0, -0.6875, 0, 0, 0.5625, 1.375, 2.25, 3.75]
    )


def test_counts_pass_the_end_of_a_limb():
    one = FULL.measure(jnp.ones((1, 2**19)))
    total = one
    for _ in range(4):
        total = FULL.merge(total, total)
    assert int(np.asarray(total["counts"])[..., 1].sum()) == 2 ** (19 + 4 - LIMB)
    assert FULL.sample(total)[1].sum() == 2**23
    # 2**31 and more: what one int32 could not hold.
    for _ in range(12):
        total = FULL.merge(total, total)
    assert FULL.sample(total)[1].sum() == 2**35


@pytest.mark.parametrize("percent", [0.0, 0.1, 25.0, 50.0, 99.0, 99.9, 99.99, 100.0])
@pytest.mark.parametrize("seed", range(3))
def test_percentiles_are_as_exact_as_stated(percent, seed):
    rng = np.random.default_rng(seed)
    # Heavy tails, and an outlier 20,000 times as large as the rest.
    x = (rng.standard_t(2, (500, 40)) * rng.lognormal(0, 2, 40)).astype(np.float32)
    x[0, 0] = (2 - seed) * 2e4
    found = jax.jit(FULL.measure)(jnp.asarray(x))
    peak, x = np.abs(x).max().astype(np.float64), x.astype(np.float64)
    tiny = 2 * peak / 2**FULL.octaves

    def bound(exact):
        return np.maximum(np.abs(exact) / (2 * FULL.per_octave), tiny)

    def neighbours(values, percent):
        # Between two neighbours the bound is that of the larger one.
        ends = [np.percentile(values, percent, method=m) for m in ("lower", "higher")]
        return max(bound(end) for end in ends)

    got, exact = FULL.percentile(found, percent), np.percentile(np.abs(x), percent)
    assert abs(got - exact) <= neighbours(np.abs(x), percent)
    ends = (50 - percent / 2, 50 + percent / 2)
    for end, got in zip(ends, FULL.interval(found, percent), strict=True):
        assert abs(got - np.percentile(x, end)) <= neighbours(x, end)
    if percent == 100:
        assert FULL.percentile(found, 100.0) == peak
        assert FULL.interval(found, 100.0) == (x.min(), x.max())


def test_a_stack_has_percentiles_of_its_own():
    x = jax.random.normal(jax.random.key(0), (3, 50, 4)) * jnp.asarray([1.0, 100, 0])[:, None, None]
    found = FULL.measure(x)
    got = FULL.percentile(found, 90.0)
    assert got.shape == (3,)
    for i in range(3):
        one = FULL.measure(x[i])
        assert got[i] == FULL.percentile(one, 90.0)
        assert FULL.least_error(found, _clipped)[1][i] == FULL.least_error(one, _clipped)[1]


def test_nothing_seen_has_no_range():
    found = FULL.measure(jnp.zeros((0, 4)))
    assert FULL.percentile(found, 99.0) == 0
    assert FULL.interval(found, 99.0) == (0, 0)
    assert FULL.least_error(found, _clipped) == (0, 0)


def test_values_of_one_sign():
    x = jnp.linspace(0.5, 3, 101)[:, None]
    for sign in (1, -1):
        found = FULL.measure(sign * x)
        assert abs(FULL.percentile(found, 50.0) - 1.75) <= 1.75 / 128
        low, high = FULL.interval(found, 90.0)
        exact = sorted((sign * 0.625, sign * 2.875))
        np.testing.assert_allclose((low, high), exact, rtol=1 / 128)


@pytest.mark.parametrize("percent", [-1.0, 100.5])
def test_a_percentile_out_of_range_is_an_error(percent):
    with pytest.raises(ValueError, match="between 0 and 100"):
        FULL.percentile(FULL.measure(jnp.ones((2, 2))), percent)


@pytest.mark.parametrize("fields", [{"per_octave": 3}, {"per_octave": 0}, {"octaves": 0}])
def test_bins_that_cannot_be_are_refused(fields):
    with pytest.raises(ValueError, match="power of two"):
        Histogram(**fields)


def _clipped(values, low, high, codes=255):
    gap = max((high - low) / codes, 1e-30)
    return np.clip(np.round(values / gap) * gap, low, high)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_range_that_errs_least_is_that_of_the_values_themselves(symmetric):
    """Within a step of the grid, of which the loss is flat: compared by loss."""
    rng = np.random.default_rng(0)
    x = rng.standard_t(3, (400, 50)).astype(np.float32)
    found = FULL.measure(jnp.asarray(x))

    def rounded(values, low, high):
        return _clipped(values, low, high, codes=15)

    low, high = FULL.least_error(found, rounded, symmetric=symmetric)
    ends = (-np.abs(x).max(), np.abs(x).max()) if symmetric else (x.min(), x.max())
    x = x.astype(np.float64)
    losses = [
        np.square(rounded(x, f * ends[0], f * ends[1]) - x).sum() for f in 1 - np.arange(80) / 100
    ]
    own = np.square(rounded(x, float(low), float(high)) - x).sum()
    # A value moves by half a bin at most, and so does its error on each side.
    slack = np.square(np.abs(x) / (2 * FULL.per_octave)).sum()
    assert (np.sqrt(own) - np.sqrt(min(losses))) <= 2 * np.sqrt(slack)
    assert own < 0.5 * losses[0]
    assert high < ends[1] and low > ends[0]


def test_a_range_that_a_scheme_rounds_by():
    x = jax.random.normal(jax.random.key(1), (200, 8)).at[0, 0].set(20.0)
    found = FULL.measure(x)

    def rounded(values, low, high):
        range = jq.ranges.Fixed(low=low, high=high)
        scheme = jq.Scheme(values=jq.INT4, tile=jq.PER_TENSOR, range=range)
        q = jq.quantize_array(jnp.asarray(values, jnp.float32)[None], scheme, contracted=(1,))
        return np.asarray(jq.dequantize(q))[0]

    _, high = FULL.least_error(found, rounded, grid=20)
    assert 3.0 < high < 20.0


def test_an_observer_is_a_value():
    assert Histogram() == Histogram(per_octave=64) and hash(Histogram()) == hash(Histogram())
    assert dataclasses.replace(Histogram(), octaves=8).bins == 513
