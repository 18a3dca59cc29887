"""Static scales: what a range rule says of all inputs at once, from statistics of batches."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from quantized import normal, uneven

import jaxquant as jq
from jaxquant.algorithms import static_observers, static_scale
from jaxquant.ops import quantize_static

TENSOR = jq.Scheme(values=jq.INT8, tile=jq.PER_TENSOR)
ZERO = dataclasses.replace(TENSOR, range=jq.MinMax(), zero_point=jq.INT8)
LOWEST = jq.AbsMax(convention=jq.Convention.LOWEST)
SIGNED = jq.AbsMax(convention=jq.Convention.SIGNED)
EXACT = {
    "abs max": TENSOR,
    "lowest": dataclasses.replace(TENSOR, range=LOWEST),
    "signed": dataclasses.replace(TENSOR, range=SIGNED),
    "min max": ZERO,
    "channels": dataclasses.replace(TENSOR, tile=jq.Tile(contracted=1, kept=None)),
    "groups with zero points": dataclasses.replace(ZERO, tile=jq.Tile(contracted=8, kept=None)),
    "fixed": dataclasses.replace(TENSOR, range=jq.ranges.Fixed(low=-3.0, high=2.0)),
    "e4m3 in bfloat16": dataclasses.replace(TENSOR, values=jq.E4M3, scale=jq.BFLOAT16),
}
CLOSE = {
    "percentile": dataclasses.replace(TENSOR, range=jq.ranges.Percentile(percent=99.0)),
    "percentile of both": dataclasses.replace(ZERO, range=jq.ranges.Percentile(percent=98.0)),
    "mse": dataclasses.replace(
        TENSOR, values=jq.INT4, range=jq.ranges.MeanSquaredError(base=jq.AbsMax(), power=2.0)
    ),
    "mse of both": dataclasses.replace(
        ZERO, values=jq.INT4, range=jq.ranges.MeanSquaredError(base=jq.MinMax(), power=2.0)
    ),
}
K = 16


def _statistics(scheme, batches):
    found = {}
    for observer in static_observers(scheme):
        total = observer.measure(batches[0])
        for x in batches[1:]:
            total = observer.merge(total, observer.measure(x))
        found[observer.name] = total
    return found


def _wanted(scheme, x):
    """Scales and zero points that `quantize_array` finds in all rows at once."""
    q = jq.quantize_array(x, scheme, contracted=(-1,), stack=tuple(range(x.ndim - 2)))
    zero = None if q.zero_point is None else q.zero_point[..., 0, :]
    return q.scale[..., 0, :].astype(jnp.float32), zero


@pytest.mark.parametrize("stack", [(), (3,)], ids=["one", "stacked"])
@pytest.mark.parametrize("name", EXACT)
def test_it_is_the_scale_of_all_batches_together(name, stack):
    scheme = EXACT[name]
    x = uneven(*stack, 24, K) + 0.5
    batches = [x[..., :7, :], x[..., 7:, :]]
    got = static_scale(scheme, _statistics(scheme, batches), stack=stack, k=K)
    scale, zero = _wanted(scheme, x)
    np.testing.assert_array_equal(got["scale"], scale)
    assert ("zero_point" in got) == (zero is not None)
    if zero is not None:
        np.testing.assert_array_equal(got["zero_point"], zero)


@pytest.mark.parametrize("name", CLOSE)
def test_what_a_histogram_tells_is_close(name):
    scheme = CLOSE[name]
    x = normal(2, 4096, K) + 0.25
    got = static_scale(scheme, _statistics(scheme, [x[:, :999], x[:, 999:]]), stack=(2,), k=K)
    scale, zero = _wanted(scheme, x)
    # A bin is 1 / 64 of a value wide; the grid of shrunk ranges has steps of 1 / 100.
    np.testing.assert_allclose(got["scale"], scale, rtol=1 / 32)
    if zero is not None:
        assert np.abs(np.asarray(got["zero_point"], int) - np.asarray(zero, int)).max() <= 2


@pytest.mark.parametrize("name", ["mse", "mse of both"])
def test_a_shrunk_range_errs_no_more_than_the_whole_one(name):
    scheme = CLOSE[name]
    x = uneven(4096, K)
    found = _statistics(scheme, [x])
    errors = []
    for rule in (scheme.range.base, scheme.range):
        own = dataclasses.replace(scheme, range=rule)
        state = static_scale(own, found, stack=(), k=K)
        parts = [None if p is None else p[None] for p in (state["scale"], state.get("zero_point"))]
        q = quantize_static(x, own, *parts, contracted=(1,))
        errors.append(float(jnp.square(jq.dequantize(q) - x).mean()))
    assert errors[1] < errors[0]


def test_where_nothing_was_seen_the_scale_is_that_of_zeros():
    for scheme in (TENSOR, ZERO, CLOSE["percentile"], CLOSE["mse"]):
        found = _statistics(scheme, [jnp.ones((4, K))])
        empty = {o.name: o.empty(found[o.name]) for o in static_observers(scheme)}
        got = static_scale(scheme, empty, stack=(), k=K)
        np.testing.assert_array_equal(got["scale"], [1.0])


@pytest.mark.parametrize(
    "scheme, said",
    [
        (dataclasses.replace(TENSOR, tile=jq.PER_CHANNEL), "scales for each token"),
        (dataclasses.replace(TENSOR, range=jq.ranges.AbsMean()), "No observer keeps .*AbsMean"),
        (
            dataclasses.replace(CLOSE["percentile"], tile=jq.Tile(contracted=4, kept=None)),
            "Histograms are of all channels .*tiles of 4",
        ),
        (
            dataclasses.replace(TENSOR, range=jq.ranges.MeanSquaredError(base=SIGNED)),
            "a signed peak",
        ),
    ],
)
def test_what_cannot_be_fixed_before_is_refused(scheme, said):
    with pytest.raises(ValueError, match=said):
        static_observers(scheme)


def test_missing_statistics_and_tiles_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="needs Extremes.*the statistics are none"):
        static_scale(TENSOR, {}, stack=(), k=K)
    scheme = dataclasses.replace(TENSOR, tile=jq.Tile(contracted=5, kept=None))
    with pytest.raises(ValueError, match="Tiles of 5 do not fill 16 inputs"):
        static_scale(scheme, _statistics(scheme, [normal(4, K)]), stack=(), k=K)
