"""What holds for every scheme: `SCHEMES` has a row each."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from code_values import every_value, values_of
from quantized import (
    around,
    centered,
    in_codes,
    nested,
    normal,
    over_codes,
    same_bits,
    scales,
    SCHEMES,
    uneven,
    values,
)

from jaxquant.numerics import (
    AbsMax,
    AbsMean,
    Convention,
    Fixed,
    FLOAT32,
    MinMax,
    RootMeanSquare,
    SharedExponent,
)
from jaxquant.qarray import (
    abstract_qarray,
    check_qarray,
    dequantize,
    QArray,
    quantize_array,
    Scheme,
    transpose,
)

pytestmark = pytest.mark.tables


def schemes_that(holds) -> pytest.MarkDecorator:
    """The schemes with a property."""
    found = {name: scheme for name, scheme in SCHEMES.items() if holds(scheme)}
    return pytest.mark.parametrize("scheme", found.values(), ids=found)


every_scheme = schemes_that(lambda scheme: True)
every_dtype = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])

# A value is multiplied by the rounded reciprocal of its scale: at most 1.5 ulp of a code. A value
# that close to the middle between two codes may go to either.
SLACK = 1.5 * 2.0**-23
# Relative error of rounding to a format: half an ulp. A shared exponent is exact.
ROUNDING = {"FLOAT32": 2.0**-24, "BFLOAT16": 2.0**-8, "FLOAT16": 2.0**-11, "E8M0": 0.0}


@functools.cache
def quantize(scheme: Scheme):
    """Quantizes a matrix whose first axis is contracted, under jit."""
    return jax.jit(lambda x: quantize_array(x, scheme, contracted=(0,)))


def _weight(dtype: jnp.dtype = jnp.float32, seed: int = 0) -> jax.Array:
    """A weight with a zero tile for every scheme, and zeros elsewhere too."""
    w = np.asarray(uneven(256, 256, seed=seed)).copy()
    w[128:, 128:] = 0
    w[:, 3] = 0
    w[::5, 7] = 0
    return jnp.asarray(w).astype(dtype)


@every_dtype
@schemes_that(lambda scheme: not scheme.codes_first)
def test_no_other_code_is_nearer(scheme: Scheme, dtype: jnp.dtype):
    x = np.asarray(_weight(dtype)).astype(np.float64)
    q = quantize(scheme)(_weight(dtype))
    wanted, chosen, zero = in_codes(x, q)
    low, high = around(wanted, scheme.values)
    nearest = np.minimum(np.abs(low - wanted), np.abs(high - wanted))
    slack = SLACK * (np.abs(wanted) + np.abs(zero))
    assert (np.abs(chosen - wanted) <= nearest + slack).all()


@schemes_that(lambda scheme: scheme.codes_first)
def test_codes_that_come_first_are_those_of_scales_in_float32(scheme: Scheme):
    plain = Scheme(values=scheme.values, tile=scheme.tile, range=scheme.range)
    q, p = quantize(scheme)(_weight()), quantize(plain)(_weight())
    assert same_bits(q.codes, p.codes) and not same_bits(scales(q), scales(p))


def _past_the_end(scheme: Scheme) -> float:
    """By how many codes the largest of a tile may be past the last: by its rule, before rounding.

    Rules that cut off a part of the values may clip anything; where they cut is in test_scale.py.
    """
    format = scheme.values
    match scheme.range:
        case AbsMax(convention=convention):
            return {Convention.HIGHEST: 0.0, Convention.MIDDLE: 0.5}.get(convention, 1.0)
        case MinMax():
            return 0.5
        case SharedExponent():
            return 2.0 ** math.ceil(math.log2(format.highest)) - format.highest
    return math.inf


@every_dtype
@schemes_that(lambda scheme: not scheme.codes_first)
def test_no_value_moves_by_more_than_half_a_gap_of_its_tile(scheme: Scheme, dtype: jnp.dtype):
    """... except for what its range clips."""
    x = np.asarray(_weight(dtype)).astype(np.float64)
    q = quantize(scheme)(_weight(dtype))
    wanted, chosen, zero = in_codes(x, q)
    inside = np.clip(wanted, scheme.values.lowest, scheme.values.highest)
    low, high = around(inside, scheme.values)
    slack = SLACK * (np.abs(wanted) + np.abs(zero) + 1)
    assert (np.abs(chosen - inside) <= (high - low) / 2 + slack).all()
    if not nested(scheme):
        # A scale that was rounded down clips the peak by as much.
        reach = scheme.values.highest - scheme.values.lowest
        past = _past_the_end(scheme) + ROUNDING[scheme.scale.name] * reach
        assert (np.abs(wanted - inside) <= past + slack).all()


def _reduced(x: np.ndarray, tile: tuple[int, ...], by: np.ufunc) -> np.ndarray:
    """For each tile, the last of which may be short."""
    for axis, size in enumerate(tile):
        x = by.reduceat(x, np.arange(0, x.shape[axis], size), axis=axis)
    return x


@schemes_that(lambda s: isinstance(s.range, AbsMax | MinMax) and not nested(s))
def test_the_largest_magnitude_of_a_tile_meets_the_end_that_the_convention_names(scheme: Scheme):
    """So a scale is neither larger nor smaller than it must be."""
    x = np.asarray(_weight()).astype(np.float64)
    q = quantize(scheme)(_weight())
    low, high = (_reduced(x, q.tile, by) for by in (np.minimum, np.maximum))
    format = scheme.values
    if isinstance(scheme.range, MinMax):
        met, end = np.maximum(high, 0) - np.minimum(low, 0), format.highest - format.lowest
    else:
        met = np.maximum(np.abs(low), np.abs(high))
        end = {
            Convention.HIGHEST: format.highest,
            Convention.MIDDLE: (format.highest - format.lowest) / 2,
            Convention.LOWEST: -format.lowest,
            Convention.SIGNED: -format.lowest,
        }[scheme.range.convention]
    expected = np.where(met == 0, 1.0, met / end)
    rounding = ROUNDING[scheme.scale.name] + 2.0**-22  # of the scale, and three in float32
    np.testing.assert_allclose(np.abs(scales(q)), expected, rtol=rounding)
    if scheme.range == AbsMax(convention=Convention.SIGNED):
        codes = _reduced(np.asarray(q.codes).astype(int), q.tile, np.minimum)
        assert (codes[met > 0] == format.lowest).all()
    else:
        assert (scales(q) > 0).all()


def _repeats(scheme: Scheme) -> bool:
    """Whether some code in use meets the end that the scale was taken from.

    Under MIDDLE and LOWEST it need not, nor under MinMax once scales are rounded: the second range
    is then smaller than the first. Scales held as codes are taken anew from each other.
    """
    match scheme.range:
        case AbsMax(convention=convention):
            met = convention in (Convention.HIGHEST, Convention.SIGNED)
        case MinMax():
            met = scheme.scale == FLOAT32
        case rule:
            met = isinstance(rule, SharedExponent | Fixed)
    return met and not nested(scheme)


@schemes_that(_repeats)
def test_quantizing_again_gives_the_same_values(scheme: Scheme):
    once = dequantize(quantize(scheme)(_weight()))
    twice = dequantize(quantize(scheme)(once))
    # The scale of the second is that of the first times two factors that cancel: 2 ulp.
    np.testing.assert_allclose(twice, once, rtol=2**-22)


@every_dtype
@every_scheme
def test_zeros_and_tiles_of_zeros_stay_zero(scheme: Scheme, dtype: jnp.dtype):
    """Where no code stands for 0, tiles of zeros become the least number there is.

    Where 0 lies between two codes, tiles of zeros are exact, and zeros of others are off by up to
    half a gap.
    """
    w = _weight(dtype)
    back = np.asarray(dequantize(quantize(scheme)(w)))
    assert back.dtype == dtype
    q = quantize(scheme)(jnp.zeros((256, 256), dtype))
    if not scheme.values.has_zero:
        assert (np.abs(values(q)) <= 2.0**-126).all() and (np.abs(back[:, 3]) <= 2.0**-126).all()
        return
    if scheme.real_zero_point:
        widest = np.asarray(scales(quantize(scheme)(w))).max()
        assert (back[:, 3] == 0).all()
        assert (np.abs(back[np.asarray(w) == 0]) <= widest * (0.5 + 2.0**-8)).all()
    else:
        assert (back[np.asarray(w) == 0] == 0).all()
    assert (values(q) == 0).all()
    if not isinstance(scheme.range, Fixed):
        # Where the mean of scales is taken off, a tile of zeros counts as 0, as in bitsandbytes.
        centered = nested(scheme) and scheme.scale.centered
        wanted = 0 if centered else 1
        np.testing.assert_allclose(scales(q), wanted, rtol=2**-22 if nested(scheme) else 0)


# A fixed range stays where it is.
@schemes_that(lambda scheme: not isinstance(scheme.range, Fixed))
def test_a_power_of_two_times_the_weight_changes_the_scales_only(scheme: Scheme):
    w = _weight()
    q, r = quantize(scheme)(w), quantize(scheme)(w * 8)
    assert same_bits(q.codes, r.codes)
    assert q.zero_point is None or same_bits(q.zero_point, r.zero_point)
    if nested(scheme):
        assert same_bits(q.scale.codes, r.scale.codes)
    used = _reduced(np.abs(np.asarray(w)), q.tile, np.maximum) > 0
    assert same_bits((8 * scales(q))[used], scales(r)[used])


HOSTILE = {
    "tiny": lambda x: x * 1e-9,
    "subnormal": lambda x: x * 1e-40,
    "near the smallest": lambda x: x * 1e-37,
    "huge": lambda x: x * 1e30,
    "at the largest": lambda x: jnp.clip(x * 3e38, -3.4e38, 3.4e38),
    "one in a tile": lambda x: jnp.zeros_like(x).at[0, 0].set(-5.0).at[200, 9].set(1e-30),
    "constant": lambda x: jnp.full_like(x, 0.1),
    "positive": lambda x: jnp.abs(x) + 100,
    "infinite": lambda x: x.at[3, 3].set(jnp.inf).at[4, 4].set(-jnp.inf),
}


@pytest.mark.parametrize("kind", HOSTILE)
@every_scheme
def test_numbers_of_any_size_give_finite_codes_and_scales(scheme: Scheme, kind: str):
    """Scales of whole numbers, or with their mean taken off, may be rounded to 0."""
    q = quantize(scheme)(HOSTILE[kind](normal(256, 256)))
    scale = scales(q)
    assert np.isfinite(scale).all()
    if not nested(scheme) or scheme.scale.values.mantissa is not None:
        assert (scale != 0).all()
    assert np.isfinite(values_of(q.codes, scheme.values)).all()


def _any_size(scheme: Scheme) -> bool:
    """Not scales of float16, which end at 6e-5 and 65504, powers of two, nor fixed ones."""
    if isinstance(scheme.range, Fixed):
        return False
    return nested(scheme) or scheme.scale.name in ("FLOAT32", "BFLOAT16")


@pytest.mark.parametrize("size", [1e-9, 1e30])
@schemes_that(_any_size)
def test_the_error_does_not_depend_on_the_size_of_the_numbers(scheme: Scheme, size: float):
    def error(factor: float) -> float:
        x = np.asarray(normal(256, 256) * jnp.float32(factor)).astype(np.float64)
        moved = values(quantize(scheme)(jnp.asarray(x.astype(np.float32)))) - x
        return (moved**2).sum() / (x**2).sum()

    # Other numbers are rounded; as many of them.
    assert error(size) == pytest.approx(error(1.0), rel=0.05)


def test_a_scale_that_float16_cannot_hold_ends_at_the_nearest_that_it_can():
    scheme = SCHEMES["int4 lowest g128 float16"]
    tiny = quantize(scheme)(normal(256, 256) * 1e-9)
    assert (np.asarray(tiny.scale) == np.float16(2.0**-14)).all()
    assert (values(tiny) == 0).all()
    huge = quantize(scheme)(normal(256, 256) * 1e30)
    assert (np.asarray(huge.scale) == np.float16(65504)).all()
    assert (np.abs(values(huge)) >= 7 * 65504).mean() > 0.99


@every_scheme
def test_nan_stays_in_its_tile(scheme: Scheme):
    w = np.array(normal(256, 256))
    w[10, 20] = np.nan
    q = quantize(scheme)(jnp.asarray(w))
    lost = np.isnan(values(q))
    tiles = np.zeros(q.scale.shape, bool)
    tiles[10 // q.tile[0], 20 // q.tile[1]] = True
    if nested(scheme):
        # Scales that share a scale, or a mean, are lost together.
        shared = q.scale.shape if scheme.scale.centered else q.scale.tile
        at = [
            slice(i // t * t, i // t * t + t)
            for i, t in zip(np.argwhere(tiles)[0], shared, strict=True)
        ]
        tiles[tuple(at)] = True
    np.testing.assert_array_equal(lost, over_codes(q, tiles))


def _summed(scheme: Scheme) -> bool:
    """Whether a scale depends on a sum, whose bits depend on the order of its terms."""
    return centered(scheme) or isinstance(scheme.range, RootMeanSquare | AbsMean)


def _assert_alike(q: QArray, expected: QArray):
    """The same bits; where scales come from sums, as near as those."""
    assert jax.tree.structure(q) == jax.tree.structure(expected)
    if not _summed(q.scheme):
        assert all(map(same_bits, jax.tree.leaves(q), jax.tree.leaves(expected)))
        return
    # Two sums of up to 2^16 terms, each of which is rounded to 2^-24 in partial sums of any order.
    np.testing.assert_allclose(scales(q), scales(expected), rtol=2.0**-7)
    order = [
        np.searchsorted(every_value(p.scheme.values), values_of(p.codes, p.scheme.values))
        for p in (q, expected)
    ]
    assert np.abs(order[0] - order[1]).max() <= 1 and (order[0] != order[1]).mean() < 1e-3


@every_scheme
def test_eager_jit_vmap_and_scan_give_the_same_bits(scheme: Scheme):
    stack = jnp.stack([_weight(seed=seed) for seed in range(2)])
    one = functools.partial(quantize_array, scheme=scheme, contracted=(0,))
    eager = jax.tree.map(lambda *parts: jnp.stack(parts), *map(one, stack))
    runs = {
        "jit": jax.jit(lambda s: quantize_array(s, scheme, contracted=(1,), stack=(0,)))(stack),
        "vmap": jax.vmap(one)(stack),
        "scan": jax.lax.scan(lambda _, w: (None, one(w)), None, stack)[1],
    }
    for q in runs.values():
        _assert_alike(q, eager)
    if _summed(scheme):
        return
    back = jax.jit(lambda w: dequantize(one(w), jnp.float32))(stack[0])
    assert same_bits(back, dequantize(one(stack[0]), jnp.float32)), "in one compiled function"


@pytest.mark.parametrize("name", ["int8 channel", "int8 tensor", "int8 zero channel"])
def test_numbers_next_to_a_tie_get_the_same_codes_however_they_are_compiled(name: str):
    """There a reciprocal for a division, or a fused product and sum, would show."""
    one = functools.partial(quantize_array, scheme=SCHEMES[name], contracted=(0,))
    w = np.asarray(normal(1024, 64)).copy()
    scale = np.broadcast_to(np.asarray(quantize(SCHEMES[name])(jnp.asarray(w)).scale), w.shape)
    # The largest of each column stay, and with them the scales.
    inner = np.abs(w) < 2.0
    ties = ((np.floor(w / scale) + 0.5) * scale).astype(np.float32)
    nudged = (ties.view(np.int32) + np.arange(-2, 3)[np.arange(1024) % 5][:, None]).astype(np.int32)
    x = jnp.asarray(np.where(inner, nudged.view(np.float32), w))
    eager, compiled = one(x), jax.jit(one)(x)
    assert all(map(same_bits, jax.tree.leaves(eager), jax.tree.leaves(compiled)))


@every_dtype
@every_scheme
def test_dequantizing_is_the_product_of_code_and_scale(scheme: Scheme, dtype: jnp.dtype):
    q = quantize(scheme)(_weight(dtype))
    # A code times a scale has at most 32 bits: exact in float64, then rounded once or twice.
    expected = values(q).astype(np.float32)
    assert same_bits(dequantize(q, jnp.float32), expected)
    assert same_bits(dequantize(q), np.asarray(jnp.asarray(expected).astype(dtype)))


@every_scheme
def test_the_axes_may_come_in_any_order(scheme: Scheme):
    w = _weight()
    q = jax.jit(lambda x: quantize_array(x, scheme, contracted=(-1,)))(w.T)
    moved, expected = transpose(q, (1, 0)), quantize(scheme)(w)
    if _summed(scheme):
        # As many values as may go to another code.
        close = np.isclose(values(moved), values(expected), rtol=2.0**-7, atol=0)
        assert close.mean() > 1 - 1e-3
    else:
        np.testing.assert_array_equal(dequantize(moved), dequantize(expected))


@every_scheme
def test_shapes_are_known_without_any_numbers(scheme: Scheme):
    q = quantize(scheme)(_weight(jnp.bfloat16))
    check_qarray(q)
    shapes = abstract_qarray((256, 256), jnp.bfloat16, scheme, contracted=(0,))
    assert jax.tree.structure(shapes) == jax.tree.structure(q)
    for shape, leaf in zip(jax.tree.leaves(shapes), jax.tree.leaves(q), strict=True):
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)
