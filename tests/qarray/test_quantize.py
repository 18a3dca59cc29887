"""What is refused, and which numbers the scales are. The laws are in tests/laws/test_schemes.py."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantized import normal, SCHEMES

from jaxquant.numerics import BFLOAT16, FLOAT16, FLOAT32, INT4, INT8, MinMax, UINT2, UINT4
from jaxquant.qarray import dequantize, PER_CHANNEL, quantize_array, Scheme, schemes
from jaxquant.qarray._quantize import quantize_with


def test_only_floats_are_quantized():
    # Without the checks of shapes that only the tests make, which refuse it in other words.
    plain = inspect.unwrap(quantize_array)
    with pytest.raises(TypeError, match="Only floating-point arrays are quantized; got int32"):
        plain(jnp.ones((4, 4), jnp.int32), SCHEMES["int8 channel"])


def test_axes_may_count_from_the_end():
    x = normal(3, 64, 32)
    scheme = SCHEMES["int8 channel"]
    q = quantize_array(x, scheme, contracted=(-2,), stack=(-3,))
    p = quantize_array(x, scheme, contracted=(1,), stack=(0,))
    assert q.tile == p.tile == (1, 64, 1)
    np.testing.assert_array_equal(q.codes, p.codes)


def test_stacked_arrays_never_share_a_scale():
    x = normal(3, 64, 32) * jnp.asarray([1.0, 100.0, 1e4])[:, None, None]
    scales = quantize_array(x, SCHEMES["int8 tensor"], contracted=(1,), stack=(0,)).scale
    assert scales.shape == (3, 1, 1)
    assert (np.diff(np.asarray(scales).ravel()) > 0).all()


def test_codes_are_chosen_for_the_scale_as_it_is_stored():
    """0.29 * 127 / 1.0 is 36.83, but over the scale rounded to bfloat16 it is 36.53 or 37.1."""
    scheme = Scheme(values=INT8, tile=PER_CHANNEL, scale=BFLOAT16)
    peaks = np.linspace(1.0, 2.0, 200, dtype=np.float32)
    x = np.stack([peaks, peaks * 0.29, peaks * -0.77], axis=1)
    q = quantize_array(jnp.asarray(x), scheme)
    exact = np.rint(x / (peaks[:, None] / 127))
    stored = np.clip(np.rint(x / np.asarray(q.scale).astype(np.float64)), -128, 127)
    np.testing.assert_array_equal(np.asarray(q.codes).astype(int), stored)
    assert (stored != exact).any()


def test_a_tie_goes_to_the_even_number_of_gaps_whatever_the_zero_point_is():
    """`round(x / scale) + zero`, as GPTQ has it: here a gap is 1, and 0 is the code -7."""
    x = jnp.asarray([[-1.0, 14.0, 0.5, 1.5, 2.5, 3.5, -0.5]])
    q = quantize_array(x, Scheme(values=INT4, tile=PER_CHANNEL, range=MinMax(), zero_point=INT4))
    assert (float(q.scale[0, 0]), int(q.zero_point[0, 0])) == (1.0, -7)
    assert (np.asarray(q.codes).astype(int) + 7).tolist() == [[-1, 14, 0, 2, 2, 4, 0]]


def test_a_zero_point_may_lie_between_two_codes():
    """-1.5 and 1.5 meet the ends of four codes a gap of 1 apart, and 0 lies in the middle."""
    x = jnp.asarray([[-1.5, 1.5, -0.5, 0.75, 0.25]])
    made = {
        zero: quantize_array(
            x, Scheme(values=UINT2, tile=PER_CHANNEL, range=MinMax(), zero_point=zero)
        )
        for zero in (UINT2, FLOAT16)
    }
    assert float(made[UINT2].zero_point[0, 0]) == 2.0
    q = made[FLOAT16]
    assert (float(q.scale[0, 0]), float(q.zero_point[0, 0])) == (1.0, 1.5)
    assert np.asarray(q.codes).tolist() == [[0, 3, 1, 2, 2]]
    assert dequantize(q).tolist() == [[-1.5, 1.5, -0.5, 0.5, 0.5]]


def test_beside_a_real_zero_point_no_value_moves_by_more_than_half_a_gap():
    x = normal(64, 128) + 0.3
    q = quantize_array(
        x, Scheme(values=UINT4, tile=PER_CHANNEL, range=MinMax(), zero_point=FLOAT32)
    )
    # Of 16 gaps, numbers round by 16 eps, thrice.
    assert (jnp.abs(dequantize(q) - x) <= q.scale * (0.5 + 48 * 2.0**-24)).all()


def test_codes_beside_a_real_zero_point_do_not_depend_on_the_compiler():
    scheme = SCHEMES["uint4 real zero g64"]
    x = normal(512, 512)
    eager, jitted = quantize_array(x, scheme), jax.jit(lambda x: quantize_array(x, scheme))(x)
    jax.tree.map(np.testing.assert_array_equal, eager, jitted)


def test_a_ragged_group_is_refused_with_a_way_out():
    with pytest.raises(ValueError, match="Tiles of 128 do not fill.*divisor of 576"):
        quantize_array(normal(576, 8), SCHEMES["int8 g128 bfloat16"], contracted=(0,))


def test_scales_that_are_known_are_used_as_they_are():
    x = jnp.asarray([[-3.0, 0.5, 1.5, 300.0]])
    q = quantize_with(x, SCHEMES["int8 channel"], jnp.ones((1, 1)))
    assert np.asarray(q.codes).tolist() == [[-3, 0, 2, 127]]


@pytest.mark.parametrize(
    "scheme, scale, zero, said",
    [
        (schemes.NF4_DOUBLE, jnp.ones((1, 1)), None, "Scales that are known are plain"),
        (SCHEMES["int8 channel"], jnp.ones((1, 2)), None, "take scales of shape .1, 1., not .1, 2"),
        (SCHEMES["int8 channel"], jnp.ones((1, 1)), jnp.ones((1, 1), jnp.int8), "some were given"),
        (SCHEMES["int8 zero channel"], jnp.ones((1, 1)), None, "none were given"),
    ],
)
def test_scales_that_do_not_fit_are_refused(scheme, scale, zero, said):
    with pytest.raises(ValueError, match=said):
        quantize_with(normal(1, 64), scheme, scale, zero)
