"""The tables against the formulas they come from, and against what others print."""

import statistics

import numpy as np
import pytest

from jaxquant.numerics._tables import bitsandbytes_fp4, dynamic_map, normal_float_4


def test_nf4_is_made_of_quantiles_of_a_normal_distribution():
    """QLoRA's code: 8 probabilities from 0.9677083 down, 7 up, and 0; scaled to end at 1."""
    quantile = statistics.NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    expected = np.sort([*above, 0.0, *below]) / max(above)
    # The published numbers are those of a library in float32: eight digits of 0.9677083.
    np.testing.assert_allclose(normal_float_4(), expected, atol=3e-7)


def test_fp4_is_the_table_of_bitsandbytes():
    """As its documentation prints it: code, then value, to six digits."""
    printed = [0, 0.005208333, 0.6666667, 1.0, 0.3333333, 0.5, 0.1666667, 0.25]
    np.testing.assert_allclose(bitsandbytes_fp4()[:8], printed, rtol=1e-6)
    np.testing.assert_array_equal(
        np.asarray(bitsandbytes_fp4()[8:]), -np.float32(bitsandbytes_fp4()[:8])
    )
    assert str(bitsandbytes_fp4()[8]) == "0.0"


def test_the_dynamic_map_has_seven_decades():
    table = np.asarray(dynamic_map())
    assert len(table) == 256 and (np.diff(table) > 0).all()
    assert 0.0 in table and 1.0 in table and -1.0 not in table
    for decade in range(7):
        ends = 10.0 ** (decade - 7), 10.0 ** (decade - 6)
        inside = table[(table > ends[0]) & (table < ends[1])]
        parts = np.linspace(*ends, 2**decade + 1)
        # Ends, their sum and the product with a power of ten are rounded to float32.
        np.testing.assert_allclose(inside, (parts[1:] + parts[:-1]) / 2, rtol=4 * 2.0**-23)
        np.testing.assert_array_equal(-inside[::-1], table[(table < -ends[0]) & (table > -ends[1])])


# Of the map that bitsandbytes' code computes with PyTorch 2.13: index, value.
PRINTED = [
    (130, 7.749999895168003e-06),
    (170, 0.04234374687075615),
    (174, 0.053593751043081284),
    (208, 0.3460937440395355),
    (218, 0.48671871423721313),
    (234, 0.7117187976837158),
]


@pytest.mark.parametrize("index, value", PRINTED)
def test_the_dynamic_map_is_that_of_bitsandbytes_to_the_bit(index: int, value: float):
    assert dynamic_map()[index] == value
