"""Scales and zero points, by hand, and the errors that each convention is known to give."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.numerics import AbsMax, Convention, E4M3, E5M2, Format, INT4, INT8, MinMax
from jaxquant.qarray import dequantize, PER_TENSOR, quantize_array, Scheme, Tile

H, M, L, S = Convention.HIGHEST, Convention.MIDDLE, Convention.LOWEST, Convention.SIGNED

# format, convention, lowest and highest of a tile -> scale.
SYMMETRIC = [
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
    (E4M3, H, -896.0, 3.0, 2.0),
    (E5M2, H, 0.0, 114688.0, 2.0),
    (INT4, H, 3.0, 7.0, 1.0),
    *((INT4, convention, 0.0, 0.0, 1.0) for convention in Convention),
]


@pytest.mark.parametrize("format, convention, low, high, scale", SYMMETRIC)
def test_the_symmetric_scale_is_as_written_by_hand(
    format: Format, convention: Convention, low: float, high: float, scale: float
):
    rule = AbsMax(convention=convention)
    got = quantize_array(
        jnp.asarray([[high / 2, low, high]]), Scheme(values=format, tile=PER_TENSOR, range=rule)
    )
    # One rounding of the reciprocal and one of the product: at most 1.5 ulp.
    np.testing.assert_allclose(got.scale, [[scale]], rtol=2**-22)


# format, lowest and highest of a tile -> scale and zero point.
ASYMMETRIC = [
    (INT4, -14.0, 16.0, 2.0, -1),
    (INT4, 0.0, 30.0, 2.0, -8),
    (INT4, 10.0, 30.0, 2.0, -8),
    (INT4, -30.0, 0.0, 2.0, 7),
    (INT4, -30.0, -10.0, 2.0, 7),
    (INT4, -6.0, 24.0, 2.0, -5),
    (INT8, -10.0, 500.0, 2.0, -123),
    (INT4, 0.0, 0.0, 1.0, -8),
]


@pytest.mark.parametrize("format, low, high, scale, zero", ASYMMETRIC)
def test_the_asymmetric_range_is_as_written_by_hand(
    format: Format, low: float, high: float, scale: float, zero: int
):
    scheme = Scheme(values=format, tile=PER_TENSOR, range=MinMax(), zero_point=format)
    got = quantize_array(jnp.asarray([[(low + high) / 2, low, high]]), scheme)
    np.testing.assert_allclose(got.scale, [[scale]], rtol=2**-22)
    assert np.asarray(got.zero_point).astype(int).tolist() == [[zero]]


# Codes of the tile [-1, 0.3, 0.55, 0.8] times 4, chosen by hand for each convention: the scales are
# 4/7, 4/7.5, 4/8, and 4/8 (the largest is negative, so -8 meets it). Under MIDDLE the largest lies
# between two codes by construction, and either is right.
BY_HAND = {
    H: [-7, 2, 4, 6],  # 2.1, 3.85, 5.6
    M: [-7.5, 2, 4, 6],  # 2.25, 4.125, 6
    L: [-8, 2, 4, 6],  # 2.4, 4.4, 6.4
    S: [-8, 2, 4, 6],
}
# ... and of its negative, where MIDDLE and LOWEST clip 7.5 and 8 to 7, and SIGNED turns the scale.
BY_HAND_NEGATED = {H: [7, -2, -4, -6], M: [7, -2, -4, -6], L: [7, -2, -4, -6], S: [-8, 2, 4, 6]}


@pytest.mark.parametrize("convention", Convention)
@pytest.mark.parametrize("sign, table", [(1.0, BY_HAND), (-1.0, BY_HAND_NEGATED)])
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
