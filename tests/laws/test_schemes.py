"""What holds for every scheme: `SCHEMES` has a row each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantized import normal, same_bits, SCHEMES, uneven, values

from jaxquant.numerics import AbsMax, Convention, Format, MinMax
from jaxquant.qarray import (
    abstract_qarray,
    check_qarray,
    dequantize,
    QArray,
    quantize_array,
    Scheme,
    transpose,
)

every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
every_dtype = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])

# A value is multiplied by the rounded reciprocal of its scale: at most 1.5 ulp of a code. A value
# that close to the middle between two codes may go to either.
SLACK = 1.5 * 2.0**-23
# Relative error of rounding to a format: half an ulp.
ROUNDING = {"FLOAT32": 2.0**-24, "BFLOAT16": 2.0**-8, "FLOAT16": 2.0**-11}


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


def _over_tiles(part: jax.Array, q: QArray) -> np.ndarray:
    wide = np.asarray(part).astype(np.float64)
    for axis, tile in enumerate(q.tile):
        wide = np.repeat(wide, tile, axis=axis)
    return wide


def _codes(format: Format) -> np.ndarray:
    if format.integer:
        return np.arange(format.lowest, format.highest + 1)
    codes = np.arange(256, dtype=np.uint8).view(format.storage).astype(np.float64)
    return np.unique(codes[np.isfinite(codes)])


@every_dtype
@every_scheme
def test_no_other_code_is_nearer(scheme: Scheme, dtype: jnp.dtype):
    x = np.asarray(_weight(dtype)).astype(np.float64)
    q = quantize(scheme)(_weight(dtype))
    scale = _over_tiles(q.scale, q)
    zero = 0 if q.zero_point is None else _over_tiles(q.zero_point, q)
    codes = _codes(scheme.values)
    # In units of a code, as a search in the sorted codes.
    wanted = x / scale + zero
    right = np.clip(np.searchsorted(codes, wanted), 1, len(codes) - 1)
    nearest = np.minimum(np.abs(codes[right - 1] - wanted), np.abs(codes[right] - wanted))
    chosen = np.abs(np.asarray(q.codes).astype(np.float64) - wanted)
    assert (chosen <= nearest + SLACK * (np.abs(wanted) + np.abs(zero))).all()


@every_dtype
@every_scheme
def test_no_value_moves_by_more_than_half_a_gap_of_its_tile(scheme: Scheme, dtype: jnp.dtype):
    """... except for what a convention clips, which is at most this many codes past the end."""
    x = np.asarray(_weight(dtype)).astype(np.float64)
    q = quantize(scheme)(_weight(dtype))
    scale = np.abs(_over_tiles(q.scale, q))
    moved = np.abs(values(q) - x)
    if scheme.values.integer:
        gap = scale
    else:
        # Floats of 2^(e+1) and more lie twice as far apart as those below; subnormals do not.
        mantissa, smallest = {"E4M3": (3, -6), "E5M2": (2, -14)}[scheme.values.name]
        # A value just below a power of two may be rounded up to it, by less than half its gap.
        exponent = np.floor(np.log2(np.maximum(np.abs(x) / scale, 2.0**-60)))
        gap = scale * 2.0 ** (np.maximum(exponent, smallest) - mantissa)
    if isinstance(scheme.range, MinMax):
        past, reach = 0.5, scheme.values.highest - scheme.values.lowest
    else:
        past = {Convention.HIGHEST: 0.0, Convention.MIDDLE: 0.5}.get(scheme.range.convention, 1.0)
        reach = scheme.values.highest
    # A scale that was rounded down clips the peak by as much.
    clipped = past + (ROUNDING[scheme.scale.name] if scheme.scale.bits < 32 else 0) * reach
    bound = np.maximum(0.5 * gap, clipped * scale if clipped > 0.5 else 0)
    assert (moved <= bound + SLACK * (np.abs(x) + scale)).all()


@every_scheme
def test_the_largest_magnitude_of_a_tile_meets_the_end_that_the_convention_names(scheme: Scheme):
    """So a scale is neither larger nor smaller than it must be."""
    x = np.asarray(_weight()).astype(np.float64)
    q = quantize(scheme)(_weight())
    blocks = x.reshape(q.scale.shape[0], q.tile[0], q.scale.shape[1], q.tile[1])
    low, high = blocks.min(axis=(1, 3)), blocks.max(axis=(1, 3))
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
    scale = np.asarray(q.scale).astype(np.float64)
    expected = np.where(met == 0, 1.0, met / end)
    rounding = ROUNDING[scheme.scale.name] + 2.0**-22  # of the scale, and three in float32
    np.testing.assert_allclose(np.abs(scale), expected, rtol=rounding)
    if scheme.range == AbsMax(convention=Convention.SIGNED):
        codes = np.asarray(q.codes).astype(int).reshape(blocks.shape).min(axis=(1, 3))
        assert (codes[met > 0] == format.lowest).all()
    else:
        assert (scale > 0).all()


def _repeats(scheme: Scheme) -> bool:
    """Whether some code in use meets the end that the scale was taken from.

    Under MIDDLE and LOWEST it need not, nor under MinMax once scales are rounded: the second range
    is then smaller than the first.
    """
    if isinstance(scheme.range, MinMax):
        return scheme.scale.bits == 32
    return scheme.range.convention in (Convention.HIGHEST, Convention.SIGNED)


REPEATABLE = {name: scheme for name, scheme in SCHEMES.items() if _repeats(scheme)}


@pytest.mark.parametrize("scheme", REPEATABLE.values(), ids=REPEATABLE)
def test_quantizing_again_gives_the_same_values(scheme: Scheme):
    once = dequantize(quantize(scheme)(_weight()))
    twice = dequantize(quantize(scheme)(once))
    # The scale comes back with the roundings of a product, a reciprocal and another product.
    np.testing.assert_allclose(twice, once, rtol=4 * 2.0**-23, atol=0)


@every_dtype
@every_scheme
def test_zeros_stay_zeros_and_so_do_tiles_of_them(scheme: Scheme, dtype: jnp.dtype):
    w = _weight(dtype)
    back = np.asarray(dequantize(quantize(scheme)(w)))
    assert back.dtype == dtype
    assert (back[np.asarray(w) == 0] == 0).all()
    q = quantize(scheme)(jnp.zeros((256, 256), dtype))
    assert (values(q) == 0).all() and (np.asarray(q.scale) == 1).all()


@every_scheme
def test_a_power_of_two_times_the_weight_changes_the_scales_only(scheme: Scheme):
    w = uneven(256, 256)
    q, r = quantize(scheme)(w), quantize(scheme)(w * 8)
    assert same_bits(q.codes, r.codes)
    assert same_bits(np.asarray(q.scale) * q.scale.dtype.type(8), r.scale)
    assert q.zero_point is None or same_bits(q.zero_point, r.zero_point)


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
    q = quantize(scheme)(HOSTILE[kind](normal(256, 256)))
    scale = np.asarray(q.scale).astype(np.float64)
    assert np.isfinite(scale).all() and (scale != 0).all()
    assert np.isfinite(np.asarray(q.codes).astype(np.float64)).all()


@pytest.mark.parametrize("size", [1e-9, 1e30])
@pytest.mark.parametrize(
    "scheme",
    [s for s in SCHEMES.values() if s.scale.name != "FLOAT16"],
    ids=[n for n, s in SCHEMES.items() if s.scale.name != "FLOAT16"],
)
def test_the_error_does_not_depend_on_the_size_of_the_numbers(scheme: Scheme, size: float):
    """Scales of float16 are the exception: they end at 6e-5 and 65504."""

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
    rows, columns = q.tile
    expected = np.zeros((256, 256), bool)
    row, column = 10 // rows * rows, 20 // columns * columns
    expected[row : row + rows, column : column + columns] = True
    np.testing.assert_array_equal(lost, expected)


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
    for name, q in runs.items():
        assert jax.tree.structure(q) == jax.tree.structure(eager), name
        assert all(map(same_bits, jax.tree.leaves(q), jax.tree.leaves(eager))), name
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
    q = transpose(quantize_array(w.T, scheme, contracted=(-1,)), (1, 0))
    np.testing.assert_array_equal(dequantize(q), dequantize(quantize(scheme)(w)))


@every_scheme
def test_shapes_are_known_without_any_numbers(scheme: Scheme):
    q = quantize(scheme)(_weight(jnp.bfloat16))
    check_qarray(q)
    shapes = abstract_qarray((256, 256), jnp.bfloat16, scheme, q.tile)
    assert jax.tree.structure(shapes) == jax.tree.structure(q)
    for shape, leaf in zip(jax.tree.leaves(shapes), jax.tree.leaves(q), strict=True):
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)
