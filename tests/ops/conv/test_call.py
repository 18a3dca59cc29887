import jax.numpy as jnp
import numpy as np
from quantized import normal

from jaxquant.ops.conv._api import make_call

SETTINGS = dict(window_strides=(1, 1), padding="VALID", feature_group_count=2)


def test_axes_are_named_by_what_the_windows_do_with_them():
    call = make_call(normal(2, 4, 6, 7), normal(3, 3, 2, 8), ("NCHW", "HWIO", "NHWC"), SETTINGS)
    assert call.specs == ((0, 1, 2, 3), (3, 2, 0, 1))
    assert (call.summed(0), call.summed(1)) == ((1, 2, 3), (2, 0, 1))
    assert call.products == 3 * 3 * 2
    assert call.out_dtype == jnp.float32


def test_the_settings_hold_for_whatever_is_convolved():
    x, w = normal(2, 5, 5, 4), normal(3, 3, 2, 8)
    call = make_call(x, w, ("NHWC", "HWIO", "NHWC"), SETTINGS)
    y = call.convolve(jnp.ones_like(x, jnp.int8), jnp.ones_like(w, jnp.int8), None, jnp.int32)
    np.testing.assert_array_equal(y, np.full((2, 3, 3, 8), 18, np.int32))
