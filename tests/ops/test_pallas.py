"""What the tests of kernels rely on: interpreted, what nobody writes is NaN."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.ops import _pallas as pallas


def test_what_a_kernel_does_not_write_is_nan():
    def half(x_ref, out_ref):
        out_ref[:4] = x_ref[:4]

    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    y = np.asarray(pallas.interpreted(half, shape)(jnp.ones((8, 128))))
    assert (y[:4] == 1).all() and np.isnan(y[4:]).all()


def test_a_grid_walks_over_blocks_and_beyond_the_end_there_is_nan():
    def kernel(x_ref, out_ref):
        step = pallas.program_id(0)
        out_ref[...] = jnp.where(jnp.isnan(x_ref[...]), -1.0, x_ref[...] + step.astype(jnp.float32))

    x = jnp.zeros((20, 128))
    spec = pallas.BlockSpec((8, 128), lambda i: (i, 0))
    y = pallas.tpu_call(
        kernel,
        name="walk",
        grid=(3,),
        semantics=("arbitrary",),
        in_specs=[spec],
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch=[],
        vmem_bytes=None,
        interpret=True,
    )(x)
    np.testing.assert_array_equal(np.asarray(y)[:, 0], np.arange(20) // 8)
