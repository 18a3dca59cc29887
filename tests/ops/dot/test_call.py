import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from quantized import normal, SCHEMES

from jaxquant.ops.dot._api import make_call
from jaxquant.ops.dot._reference import run
from jaxquant.qarray import quantize_array


def _call():
    q = quantize_array(normal(4, 64, 6, 3), SCHEMES["int8 channel"], contracted=(1,), stack=(0,))
    return make_call(normal(5, 4, 64, 2), q, (((2,), (1,)), ((1,), (0,))))


def test_free_axes_are_what_is_left_in_logical_order():
    call = _call()
    assert (call.free(0), call.free(1)) == ((0, 3), (2, 3))
    assert (call.rows(0), call.rows(1)) == (10, 18)
    assert call.dimension_numbers == (((2,), (1,)), ((1,), (0,)))
    assert call.out_dtype == jnp.float32 and call.platform == "cpu"


def test_the_flipped_call_is_the_same_product_with_free_axes_exchanged():
    call = _call()
    assert call.flipped.flipped.dimension_numbers == call.dimension_numbers
    y, z = run(call), run(call.flipped)
    assert (y.shape, z.shape) == ((4, 5, 2, 6, 3), (4, 6, 3, 5, 2))
    # Sums of 64 products of about 1, in another order.
    np.testing.assert_allclose(y, z.transpose(0, 3, 4, 1, 2), rtol=0, atol=64 * 2.0**-20)


def test_precision_is_carried():
    x, w = normal(2, 8), quantize_array(normal(8, 2), SCHEMES["int8 channel"], contracted=(0,))
    call = make_call(x, w, (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
    assert call.precision == call.flipped.precision == lax.Precision.HIGHEST


def test_the_plain_side_is_rounded_where_that_is_asked_for_and_shapes_tell_as_much():
    x, w = normal(5, 4, 64), quantize_array(normal(64, 6), SCHEMES["int4 channel"], contracted=(0,))
    scheme = SCHEMES["int8 channel"]
    call = make_call(x, w, (((2,), (0,)), ((), ())), activations=scheme)
    rounded, shapes = call.rounded(), call.rounded_shapes()
    assert rounded.activations is shapes.activations is None
    assert rounded.rhs is w and rounded.lhs.scheme == scheme
    expected = quantize_array(x, scheme)
    for got in (rounded.lhs, shapes.lhs):
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        assert [a.shape for a in jax.tree.leaves(got)] == [(5, 4, 64), (5, 4, 1)]
    np.testing.assert_array_equal(rounded.lhs.codes, expected.codes)
    turned = make_call(w, x, (((0,), (2,)), ((), ())), activations=scheme).rounded()
    np.testing.assert_array_equal(turned.rhs.codes, expected.codes)
    assert rounded.rounded() is rounded and rounded.rounded_shapes() is rounded
