"""Scales and zero points against NumPy in float64, by hand, and by known errors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from code_values import every_value
from quantized import normal

from jaxquant.numerics import (
    AbsMax,
    AbsMean,
    BINARY,
    Convention,
    E2M1,
    E3M2,
    E4M3,
    E5M2,
    ExponentRule,
    Fixed,
    Format,
    INT4,
    INT8,
    MeanSquaredError,
    MinMax,
    NF4,
    peak,
    Percentile,
    Range,
    RootMeanSquare,
    SharedExponent,
    TERNARY,
    UINT2,
    UINT4,
)
from jaxquant.numerics._scale import (
    asymmetric_scale,
    offset_by,
    symmetric_scale,
    TINY,
    zero_point,
)
from jaxquant.qarray import dequantize, quantize_array, Scheme, Tile

H, M, L, S = Convention.HIGHEST, Convention.MIDDLE, Convention.LOWEST, Convention.SIGNED
# Rows of a tile each; axis 1 is the tile.
ROWS = np.asarray(normal(64, 48)) * np.float32(2.0) ** np.arange(-32, 32, dtype=np.float32)[:, None]


def _symmetric(x: np.ndarray, rule: Range, format: Format) -> np.ndarray:
    run = jax.jit(lambda x: symmetric_scale(x, (1,), rule, format))
    return np.asarray(run(jnp.asarray(x, jnp.float32)))[:, 0].astype(np.float64)


def _asymmetric(x: np.ndarray, rule: Range, format: Format) -> tuple[np.ndarray, np.ndarray]:
    run = jax.jit(lambda x: asymmetric_scale(x, (1,), rule, format))
    scale, low = run(jnp.asarray(x, jnp.float32))
    return np.asarray(scale)[:, 0].astype(np.float64), np.asarray(low)[:, 0].astype(np.float64)


# format, convention, lowest and highest of a tile -> scale.
BY_HAND = [
    (INT4, H, -1.0, 14.0, 2.0),
    (INT4, H, -14.0, 1.0, 2.0),
    (INT4, M, -1.0, 15.0, 2.0),
    (INT4, L, -1.0, 16.0, 2.0),
    (INT4, L, -16.0, 1.0, 2.0),
    (INT4, S, -16.0, 1.0, 2.0),
    (INT4, S, -1.0, 16.0, -2.0),
    (INT4, S, -16.0, 16.0, 2.0),
    (INT8, H, -1.0, 254.0, 2.0),
    (INT8, M, -255.0, 1.0, 2.0),
    (INT8, L, -256.0, 1.0, 2.0),
    (INT8, S, 0.0, 256.0, -2.0),
    (UINT4, H, 0.0, 30.0, 2.0),
    (E4M3, H, -896.0, 3.0, 2.0),
    (E5M2, H, 0.0, 114688.0, 2.0),
    (E2M1, H, -3.0, 12.0, 2.0),
    (NF4, H, -2.0, 1.0, 2.0),
    (TERNARY, H, -2.0, 1.0, 2.0),
    (BINARY, H, -2.0, 1.0, 2.0),
    (INT4, H, 3.0, 7.0, 1.0),
    *((INT4, convention, 0.0, 0.0, 1.0) for convention in Convention),
    (BINARY, H, 0.0, 0.0, TINY),
]


@pytest.mark.parametrize("format, convention, low, high, scale", BY_HAND)
def test_the_largest_magnitude_meets_the_end(
    format: Format, convention: Convention, low: float, high: float, scale: float
):
    got = _symmetric(np.asarray([[high / 2, low, high]]), AbsMax(convention=convention), format)
    # One rounding of the reciprocal and one of the product: at most 1.5 ulp.
    np.testing.assert_allclose(got, [scale], rtol=2**-22)


def _ends(rule: Range, x: np.ndarray) -> np.ndarray:
    """What meets the end of the format, in float64."""
    size = np.abs(x)
    match rule:
        case Percentile(percent=p):
            return np.percentile(size, p, axis=1)
        case RootMeanSquare(multiple=m):
            return m * np.sqrt((size**2).mean(axis=1))
        case AbsMean(multiple=m):
            return m * size.mean(axis=1)
        case Fixed(low=low, high=high):
            return np.full(len(x), max(-low, high))
    raise AssertionError(rule)


# How many ends there are in -1 times the format's range that meets the end of a tile.
DIVISORS = {H: lambda f: f.highest, M: lambda f: (f.highest - f.lowest) / 2, L: lambda f: -f.lowest}
# Rules, and the roundings of each on the way to an end: percentiles interpolate between two, with
# a weight of 2^-17 of their distance or so; sums of 48 in any order.
STATISTICS = [
    (Percentile(percent=90.0), 2.0**-17),
    (Percentile(percent=99.5), 2.0**-17),
    (Percentile(percent=100.0), 2.0**-23),
    (RootMeanSquare(multiple=2.5), 52 * 2.0**-24),
    (AbsMean(), 50 * 2.0**-24),
    (AbsMean(multiple=0.7), 50 * 2.0**-24),
    (Fixed(low=-2.0, high=6.0), 2.0**-24),
    (Fixed(low=-8.0, high=6.0), 2.0**-24),
]


@pytest.mark.parametrize("format", [INT4, E4M3, NF4, TERNARY, BINARY], ids=repr)
@pytest.mark.parametrize("rule, rounding", STATISTICS)
def test_every_statistic_is_that_of_float64(rule: Range, rounding: float, format: Format):
    got = _symmetric(ROWS, rule, format)
    expected = _ends(rule, ROWS.astype(np.float64)) / format.highest
    np.testing.assert_allclose(got, expected, rtol=rounding + 2.0**-22)


@pytest.mark.parametrize("size", [3e38, 2.0**-110])
@pytest.mark.parametrize("rule", [AbsMean(), RootMeanSquare(multiple=1.0)], ids=str)
def test_extreme_numbers_have_means_too(rule: Range, size: float):
    x = np.clip(np.asarray(normal(8, 64)), -1, 1) * np.float32(size)
    expected = _ends(rule, x.astype(np.float64)) / INT8.highest
    np.testing.assert_allclose(_symmetric(x, rule, INT8), expected, rtol=80 * 2.0**-24)


@pytest.mark.parametrize("convention", [M, L])
@pytest.mark.parametrize("kind", [Percentile, RootMeanSquare, Fixed])
def test_every_statistic_takes_a_convention(kind: type, convention: Convention):
    arguments = {
        Percentile: dict(percent=95.0),
        RootMeanSquare: dict(multiple=3.0),
        Fixed: dict(low=0.0, high=3.0),
    }[kind]
    rule = kind(convention=convention, **arguments)
    expected = _ends(rule, ROWS.astype(np.float64)) / DIVISORS[convention](INT4)
    np.testing.assert_allclose(_symmetric(ROWS, rule, INT4), expected, rtol=2.0**-16)


@pytest.mark.parametrize("rule", [r for r, _ in STATISTICS] + [SharedExponent()], ids=str)
def test_a_tile_of_zeros_has_the_scale_1_and_one_with_nan_has_nan(rule: Range):
    format = E4M3 if isinstance(rule, SharedExponent) else INT8
    x = ROWS[30:33].copy()
    x[0], x[2, 5] = 0, np.nan
    got = _symmetric(x, rule, format)
    if not isinstance(rule, Fixed):
        assert got[0] == 1
    assert np.isfinite(got[:2]).all() and np.isnan(got[2])


def test_the_peak_keeps_nan_and_the_axis():
    x = jnp.asarray([[1.0, -3.0], [jnp.nan, 2.0]])
    np.testing.assert_array_equal(peak(x, 1), [[3.0], [np.nan]])
    np.testing.assert_array_equal(peak(x[:1], (0, 1)), [[3.0]])


# Rows of powers of two, of the largest number of a format times those, and what is just beside.
EXPONENTS = [-130, -100, -9, -1, 0, 1, 7, 60, 120]
MX = [E4M3, E5M2, E3M2, E2M1]


@pytest.mark.parametrize("rule", ExponentRule)
@pytest.mark.parametrize("format", MX, ids=repr)
def test_a_shared_exponent_is_that_of_the_largest_magnitude(format: Format, rule: ExponentRule):
    starts = np.float32([1.0, format.highest, 1.9999])
    sizes = [
        math.ldexp(np.nextafter(start, np.float32(start * step)), exponent)
        for start in starts
        for step in (1, 0, 2)
        for exponent in EXPONENTS
    ]
    sizes = np.float32([x for x in sizes if TINY <= x <= 2.0**120])
    x = np.stack([sizes * -np.float32(0.5), sizes * np.float32(1.0)], axis=1)
    got = _symmetric(x, SharedExponent(rule=rule), format)
    largest = math.floor(math.log2(format.highest))
    exact = sizes.astype(np.float64)
    if rule is not ExponentRule.CEIL:
        if rule is ExponentRule.EVEN:
            mantissa, power = np.frexp(exact)
            steps = 2.0 ** (format.mantissa + 1)
            exact = np.ldexp(np.floor(mantissa * steps + 0.5) / steps, power)
        exponents = np.floor(np.log2(exact)) - largest
        # log2 in float64 takes what is just below a power of two for it.
        exponents -= np.ldexp(1.0, (exponents + largest).astype(int)) > exact
    else:
        exponents = np.ceil(np.log2(exact / format.highest))
        exponents += np.ldexp(format.highest, exponents.astype(int)) < exact
    np.testing.assert_array_equal(got, 2.0 ** np.clip(exponents, -126, 126))
    unclipped = got > TINY
    if rule is ExponentRule.CEIL:
        # The least power of two that clips nothing.
        assert (exact <= format.highest * got).all()
        assert (exact > format.highest * got / 2)[unclipped].all()
    else:
        assert (exact < 2.0 ** (largest + 1) * got).all()
        assert (exact >= 2.0**largest * got)[unclipped].all()


def test_an_exponent_by_hand():
    x = np.asarray([[448.0], [448.0 * 2**9], [449.0], [256.0], [255.0], [3e38], [0.0]])
    floor, ceil, even = (_symmetric(x, SharedExponent(rule=r), E4M3).tolist() for r in ExponentRule)
    assert floor == [1, 512, 1, 1, 0.5, 2.0**119, 1]
    assert ceil == [1, 512, 2, 1, 1, 2.0**120, 1]
    # 255 rounds to 256 in E4M3's four bits; 449 to 448.
    assert even == [1, 512, 1, 1, 1, 2.0**119, 1]


def test_even_exponents_round_up_from_the_middle_between_a_power_and_the_number_below():
    """E2M1: 7 lies between 6 and 8. int8 has steps of 1: 127.5 lies between 127 and 128."""
    for format, middle in ((E2M1, 7.0), (INT8, 127.5)):
        x = np.asarray([[middle], [np.nextafter(np.float32(middle), np.float32(0))]])
        got = _symmetric(x, SharedExponent(rule=ExponentRule.EVEN), format)
        np.testing.assert_array_equal(got, [2, 1])


def test_infinity_has_an_infinite_exponent_and_nan_has_nan():
    got = _symmetric(np.asarray([[np.inf, 1], [np.nan, 1]]), SharedExponent(), E2M1)
    assert np.isinf(got[0]) and np.isnan(got[1])


# format, lowest and highest of a tile -> scale and zero point, with and without 0 in the range.
ASYMMETRIC = [
    (INT4, -14.0, 16.0, 2.0, -1, 2.0, -1),
    (INT4, 0.0, 30.0, 2.0, -8, 2.0, -8),
    (INT4, 10.0, 40.0, 40 / 15, -8, 2.0, -13),
    (INT4, -40.0, -10.0, 40 / 15, 7, 2.0, 12),
    (INT4, -6.0, 24.0, 2.0, -5, 2.0, -5),
    (UINT4, -6.0, 24.0, 2.0, 3, 2.0, 3),
    (INT8, -10.0, 500.0, 2.0, -123, 2.0, -123),
    (INT4, 0.0, 0.0, 1.0, -8, 1.0, -8),
    # One number apart from 0 is its own gap; with 0 it is an end.
    (INT4, 3.0, 3.0, 0.2, -8, 3.0, -9),
    (INT4, -3.0, -3.0, 0.2, 7, 3.0, -7),
]


@pytest.mark.parametrize("format, low, high, scale, zero, own_scale, own_zero", ASYMMETRIC)
def test_both_ends_meet_the_smallest_and_largest(
    format: Format, low: float, high: float, scale: float, zero: int, own_scale, own_zero
):
    x = np.asarray([[(low + high) / 2, low, high]])
    for include_zero, wanted in ((True, (scale, zero)), (False, (own_scale, own_zero))):
        gap, start = _asymmetric(x, MinMax(include_zero=include_zero), format)
        np.testing.assert_allclose(gap, wanted[0], rtol=2**-22)
        got = zero_point(jnp.float32(start), jnp.float32(gap), format)
        assert round(float(got[0])) == wanted[1]


@pytest.mark.parametrize("percent", [60.0, 99.0, 100.0])
def test_asymmetric_percentiles_cut_both_ends_alike(percent: float):
    x = ROWS + np.abs(ROWS).max(axis=1, keepdims=True) * np.linspace(-2, 2, 64)[:, None]
    gap, low = _asymmetric(x, Percentile(percent=percent), UINT4)
    exact = x.astype(np.float32).astype(np.float64)
    ends = np.percentile(exact, [50 - percent / 2, 50 + percent / 2], axis=1)
    start, end = np.minimum(ends[0], 0), np.maximum(ends[1], 0)
    # As above, of the distance between neighbours; and one difference.
    error = 2.0**-16 * np.abs(exact).max(axis=1)
    assert (np.abs(low - start) <= error).all()
    assert (np.abs(gap - (end - start) / 15) <= 2 * error / 15).all()


def test_an_asymmetric_fixed_range_is_what_it_says():
    gap, low = _asymmetric(ROWS, Fixed(low=-1.0, high=6.5), UINT4)
    np.testing.assert_allclose(gap, 0.5, rtol=2**-22)
    assert (low == -1).all()
    lost = _asymmetric(np.asarray([[np.nan, 1.0]]), Fixed(low=-1.0, high=6.5), UINT4)[0]
    assert np.isnan(lost).all()


def _error(x: np.ndarray, scale: float, format: Format, power: float, zero: int | None) -> float:
    """Sum of errors to a power, by a search among the format's values, in float64."""
    values = every_value(format)
    wanted = x / scale if zero is None else np.rint(x / scale) + zero
    right = np.clip(np.searchsorted(values, wanted), 1, len(values) - 1)
    pair = np.stack([values[right - 1], values[right]])
    nearest = pair[np.abs(pair - wanted).argmin(axis=0), np.arange(len(x))]
    return float((np.abs((nearest - (zero or 0)) * scale - x) ** power).sum())


SEARCHED = [
    (MeanSquaredError(base=AbsMax()), INT4),
    (MeanSquaredError(base=AbsMax(convention=M), grid=40, shrink=0.5, power=2.0), INT4),
    (MeanSquaredError(base=AbsMax()), NF4),
    (MeanSquaredError(base=AbsMax(), grid=20), E2M1),
    (MeanSquaredError(base=MinMax()), UINT4),
]


@pytest.mark.parametrize("rule, format", SEARCHED)
def test_no_other_factor_of_the_grid_errs_less(rule: MeanSquaredError, format: Format):
    asymmetric = isinstance(rule.base, MinMax)
    rows = np.asarray(normal(12, 64)) * 2.0 ** np.arange(-30, 30, 5)[:, None]
    if asymmetric:
        base, low = _asymmetric(rows, rule.base, format)
        got, got_low = _asymmetric(rows, rule, format)
        np.testing.assert_allclose(got_low / low, got / base, rtol=2**-22)
    else:
        base, got = _symmetric(rows, rule.base, format), _symmetric(rows, rule, format)
    count = int(rule.grid * rule.shrink)
    factors = 1 - np.arange(count) / rule.grid
    chosen = got / base
    at = np.abs(factors[None] - chosen[:, None]).argmin(axis=1)
    np.testing.assert_allclose(chosen, factors[at], rtol=2**-22)
    assert len(set(at)) > 2, "the search should matter"
    for i, row in enumerate(rows.astype(np.float64)):
        zero = round(float(format.lowest - low[i] / base[i])) if asymmetric else None
        errors = [_error(row, base[i] * f, format, rule.power, zero) for f in factors]
        # Each of 64 powers and their sum are rounded; a value near a tie may go to either side.
        assert errors[at[i]] <= min(errors) * (1 + 128 * 2.0**-22), (i, at[i], np.argmin(errors))


def test_of_equal_factors_the_widest_is_kept():
    rule = MeanSquaredError(base=AbsMax())
    assert _symmetric(np.asarray([[7.0, 1.0, -3.0, 0.0]]), rule, INT4)[0] == pytest.approx(
        1.0, rel=2**-22
    )
    assert _symmetric(np.zeros((1, 4)), rule, INT4)[0] == 1.0


# Codes of the tile [-1, 0.3, 0.55, 0.8] times 4, chosen by hand for each convention: the scales are
# 4/7, 4/7.5, 4/8, and 4/8 (the largest is negative, so -8 meets it). Under MIDDLE the largest lies
# between two codes by construction, and either is right.
CODES = {
    H: [-7, 2, 4, 6],  # 2.1, 3.85, 5.6
    M: [-7.5, 2, 4, 6],  # 2.25, 4.125, 6
    L: [-8, 2, 4, 6],  # 2.4, 4.4, 6.4
    S: [-8, 2, 4, 6],
}
# ... and of its negative, where MIDDLE and LOWEST clip 7.5 and 8 to 7, and SIGNED turns the scale.
CODES_NEGATED = {H: [7, -2, -4, -6], M: [7, -2, -4, -6], L: [7, -2, -4, -6], S: [-8, 2, 4, 6]}


@pytest.mark.parametrize("convention", Convention)
@pytest.mark.parametrize("sign, table", [(1.0, CODES), (-1.0, CODES_NEGATED)])
def test_four_codes_are_as_written_by_hand(convention: Convention, sign: float, table: dict):
    x = jnp.asarray([[-4.0, 1.2, 2.2, 3.2]]) * sign
    scheme = Scheme(values=INT4, tile=Tile(contracted=4), range=AbsMax(convention=convention))
    codes = np.asarray(quantize_array(x, scheme).codes).astype(float)
    expected = np.asarray([table[convention]])
    assert (np.abs(codes - expected) <= np.where(expected == -7.5, 0.5, 0)).all()


# Normalized squared error of int4 in groups of 128 on Gaussian numbers, measured independently on
# other Gaussian numbers; 2% is what another seed may change. SIGNED is like LOWEST, except that
# the larger end is never clipped; it has no anchor there.
ANCHORS = {H: 0.01378, M: 0.01228, L: 0.01115, None: 0.01011}


@pytest.mark.parametrize("convention", ANCHORS)
def test_the_error_on_gaussian_numbers_is_the_known_one(convention: Convention | None):
    w = np.random.Generator(np.random.PCG64(0)).standard_normal((512, 2048), dtype=np.float32)
    if convention is None:
        scheme = Scheme(values=INT4, tile=Tile(contracted=128), range=MinMax(), zero_point=INT4)
    else:
        rule = AbsMax(convention=convention)
        scheme = Scheme(values=INT4, tile=Tile(contracted=128), range=rule)
    moved = np.asarray(dequantize(quantize_array(jnp.asarray(w), scheme))) - w
    error = (moved.astype(np.float64) ** 2).sum() / (w.astype(np.float64) ** 2).sum()
    assert error == pytest.approx(ANCHORS[convention], rel=0.02)


def test_a_product_and_a_term_are_rounded_apart():
    """`1 + 2^-12` squared is `1 + 2^-11` once rounded; less that, 0, and not 2^-24."""
    x = jnp.full((8,), 1 + 2.0**-12)
    run = jax.jit(lambda x: offset_by(x * x, -(1 + 2.0**-11) * jnp.ones(8)))
    np.testing.assert_array_equal(run(x), 0)


def test_a_search_knows_zero_points_between_codes():
    """Three of four codes of a gap of 1 are met, with 0 half a gap from any: nothing is better."""
    x = jnp.asarray([[-1.5, -0.5, 0.5, 1.5]])
    rule = MeanSquaredError(base=MinMax())
    real, _ = asymmetric_scale(x, (1,), rule, UINT2, real_zero=True)
    code, _ = asymmetric_scale(x, (1,), rule, UINT2)
    assert float(real[0, 0]) == 1.0 and float(code[0, 0]) < 1.0
