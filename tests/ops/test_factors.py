import jax.numpy as jnp
import numpy as np
import pytest
from quantized import centered, codes_of, layouts, normal, SCHEMES, values

from jaxquant.numerics import E4M3, INT8, NF4, TERNARY
from jaxquant.ops._factors import (
    factors,
    fits_int8,
    product_dtypes,
    refuses_codes,
    scaled_after,
    scales,
)
from jaxquant.qarray import PER_CHANNEL, quantize_array, relayout, Scheme, schemes, Tile


@pytest.mark.parametrize("name", SCHEMES)
def test_factors_by_scales_are_the_values_in_logical_order(name: str):
    q = codes_of(SCHEMES[name], 256, 128)
    for layout in layouts(SCHEMES[name], first=256, last=128):
        moved = relayout(q, layout)
        scale = scales(moved, (0,))
        assert scale.shape[1] == 128
        wide = jnp.repeat(scale, moved.tile[0], axis=0)[:256]
        product = factors(moved, jnp.float32) * wide
        # Codes less zero points are exact, and each product is rounded once. Scales of which a mean
        # was taken off are sums, rounded to the last place of the largest of them.
        off = 2.0**-23 * float(jnp.abs(product).max())
        np.testing.assert_allclose(
            product, values(q), rtol=2.0**-24, atol=off if centered(SCHEMES[name]) else 0
        )


def test_a_scale_for_several_kept_elements_is_repeated_for_each():
    q = quantize_array(normal(6, 8, 4), SCHEMES["int8 tensor"], contracted=(1,))
    assert q.scale.shape == (1, 1, 1)
    assert scales(q, (1,)).shape == (6, 1, 4)
    ragged = Scheme(values=INT8, tile=Tile(contracted=3, kept=4, ragged=True))
    q = quantize_array(normal(6, 8), ragged, contracted=(1,))
    assert scales(q, (1,)).shape == (6, 3)
    np.testing.assert_array_equal(scales(q, (1,))[4:], jnp.repeat(q.scale[1:], 2, axis=0))


def test_sums_are_scaled_after_where_one_scale_holds_and_the_dtype_holds_the_values():
    def after(scheme, dtype=None):
        return scaled_after(quantize_array(normal(64, 8), scheme, contracted=(0,)), (0,), dtype)

    assert after(SCHEMES["int8 channel"], jnp.bfloat16) and after(SCHEMES["e4m3 channel"])
    assert not after(SCHEMES["int4 g32 bfloat16"], jnp.float32)
    table = Scheme(values=NF4, tile=PER_CHANNEL)
    assert after(table, jnp.float32) and not after(table, jnp.bfloat16)
    # A centered array is more than scaled codes.
    assert not after(Scheme(values=INT8, tile=PER_CHANNEL, centered=True))


def test_what_codes_are_multiplied_in():
    def pair(left, right):
        return tuple(
            quantize_array(normal(8, 8), Scheme(values=v, tile=PER_CHANNEL)) for v in (left, right)
        )

    assert product_dtypes(*pair(INT8, INT8)) == (jnp.int8, jnp.int32)
    assert product_dtypes(*pair(E4M3, E4M3)) == (jnp.bfloat16, jnp.float32)
    assert product_dtypes(*pair(E4M3, NF4)) == (jnp.float32, jnp.float32)
    assert refuses_codes(*pair(E4M3, NF4)) is None
    assert "integers with integers and floats with floats, not INT8 with E4M3" in refuses_codes(
        *pair(INT8, E4M3)
    )


def test_what_cannot_be_multiplied_is_refused():
    x = quantize_array(normal(8, 8), SCHEMES["int8 channel"])
    zero = quantize_array(normal(8, 8), SCHEMES["int8 zero channel"])
    assert "INT8 less its zero point does not fit int8" in refuses_codes(x, zero)
    assert refuses_codes(x, quantize_array(normal(8, 64), SCHEMES["int4 zero g64"])) is None
    centered = Scheme(values=INT8, tile=PER_CHANNEL, centered=True)
    assert "a centered QArray" in refuses_codes(x, quantize_array(normal(8, 8), centered))
    assert schemes.TERNARY.values is TERNARY
    assert refuses_codes(x, quantize_array(normal(8, 8), schemes.TERNARY)) is None


FITS = {
    "int8 channel": True,
    "int8 zero channel": False,
    "int4 zero g64": True,
    # A zero point of 8 bits may be -128, and 7 - (-128) is not an int8.
    "int4 wide zero g32 bfloat16": False,
    "int4 channel": True,
    # A zero point between two codes leaves no integers.
    "uint4 real zero g64": False,
}


@pytest.mark.parametrize("name", FITS)
def test_whether_codes_less_zero_points_fit_int8_depends_on_their_formats(name: str):
    q = quantize_array(normal(256, 8), SCHEMES[name], contracted=(0,))
    assert fits_int8(q) == FITS[name]
