import jax.numpy as jnp
import numpy as np
from quantized import normal

from jaxquant.ops.ragged_dot._api import make_call

SIZES = jnp.asarray([2, 0, 3], jnp.int32)


def test_each_row_has_an_expert_and_rows_beyond_have_none():
    call = make_call(normal(7, 4), normal(3, 4, 2), SIZES)
    np.testing.assert_array_equal(call.expert_of_row(), [0, 0, 2, 2, 2, 3, 3])


def test_the_product_of_other_arrays_goes_by_the_same_groups():
    call = make_call(normal(7, 4), normal(3, 4, 2), SIZES)
    experts = jnp.asarray([1, 2, 3], jnp.int8)[:, None, None] * jnp.ones((3, 4, 2), jnp.int8)
    y = call.multiply(jnp.ones((7, 4), jnp.int8), experts, None, jnp.int32)
    np.testing.assert_array_equal(y[:, 0], np.asarray([4, 4, 12, 12, 12, 0, 0], np.int32))
