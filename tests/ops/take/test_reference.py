import jax.numpy as jnp
import numpy as np
from jax import lax
from quantized import normal, SCHEMES

from jaxquant.ops.take._reference import gather
from jaxquant.qarray import dequantize, Layout, quantize_array, relayout


def test_it_gathers_from_what_the_codes_stand_for():
    q = quantize_array(normal(16, 64), SCHEMES["int4 zero g64"])
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0,)
    )
    params = dict(dimension_numbers=numbers, slice_sizes=(1, 64), mode="fill")
    indices = jnp.asarray([[3], [99], [0]])
    got = gather(relayout(q, Layout(order=(-1, -2))), indices, **params)
    np.testing.assert_array_equal(got, lax.gather(dequantize(q), indices, **params))
    assert np.isnan(got[1]).all() and got.shape == (3, 64)
