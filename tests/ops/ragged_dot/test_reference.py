import jax.numpy as jnp
import numpy as np
from quantized import normal, SCHEMES, values

from jaxquant.ops.ragged_dot._api import make_call
from jaxquant.ops.ragged_dot._reference import refuses, run
from jaxquant.qarray import quantize_array

SIZES = jnp.asarray([2, 0, 3], jnp.int32)


def test_it_is_the_product_of_what_the_codes_stand_for_whatever_they_are():
    x = quantize_array(normal(6, 64), SCHEMES["e4m3 channel"])
    w = quantize_array(normal(3, 64, 4), SCHEMES["int4 zero g64"], contracted=(1,), stack=(0,))
    call = make_call(x, w, SIZES)
    assert refuses(call) is None
    left, right = values(x), values(w)
    expected = np.stack([left[i] @ right[e] for i, e in enumerate([0, 0, 2, 2, 2])])
    magnitude = np.abs(left[:5]) @ np.abs(right).max(axis=0)
    got = np.asarray(run(call))
    assert (np.abs(got[:5] - expected) <= 72 * 2.0**-24 * magnitude).all()
    np.testing.assert_array_equal(got[5], np.zeros(4))


def test_half_precision_operands_are_summed_in_float32():
    """4096 ones: in bfloat16 the sum would stand still at 256."""
    x = jnp.ones((1, 4096), jnp.bfloat16)
    q = quantize_array(jnp.ones((1, 4096, 1)), SCHEMES["int8 channel"], contracted=(1,), stack=(0,))
    call = make_call(x, q, jnp.ones((1,), jnp.int32), out_dtype=jnp.float32)
    np.testing.assert_allclose(run(call), [[4096.0]], rtol=1e-6)
