"""What kernels move is read from their grids."""

import jax
import jax.numpy as jnp
import pytest

from jaxquant.ops._pallas import BlockSpec, tpu_call, traffic


def _traffic(in_map, *, grid=(2, 3), shape=(16, 384), block=(8, 128), cores=1, dtype=jnp.bfloat16):
    def body(x_ref, out_ref):
        out_ref[...] = x_ref[...].astype(jnp.float32)

    call = tpu_call(
        body,
        name="copies",
        grid=grid,
        semantics=("arbitrary",) * len(grid),
        in_specs=[BlockSpec(block, in_map)],
        out_specs=BlockSpec((8, 128), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((16, 384), jnp.float32),
        scratch=[],
        vmem_bytes=None,
        interpret=False,
    )
    jaxpr = jax.make_jaxpr(jax.jit(lambda x: call(x)))(jax.ShapeDtypeStruct(shape, dtype))
    (found,) = traffic(jaxpr.jaxpr, cores)
    assert found.name == "copies"
    return found.bytes - 16 * 384 * 4, found.first


BLOCK = 8 * 128 * 2


def test_each_block_once():
    assert _traffic(lambda i, j: (i, j)) == (6 * BLOCK, BLOCK)


def test_a_block_that_stays_is_moved_once_and_one_that_comes_back_again():
    assert _traffic(lambda i, j: (i, 0)) == (2 * BLOCK, BLOCK)
    assert _traffic(lambda i, j: (0, j)) == (6 * BLOCK, BLOCK)
    assert _traffic(lambda i, j: (0, jnp.where(i == 0, j, 2))) == (3 * BLOCK, BLOCK)


def test_every_core_reads_for_itself():
    assert _traffic(lambda i, j: (0, 0)) == (BLOCK, BLOCK)
    assert _traffic(lambda i, j: (0, 0), cores=2) == (2 * BLOCK, 2 * BLOCK)


def test_the_last_block_ends_with_its_array():
    assert _traffic(lambda i, j: (i, j), shape=(16, 300)) == (16 * 300 * 2, BLOCK)


@pytest.mark.parametrize("dtype", [jnp.int4, jnp.float4_e2m1fn])
def test_small_numbers_lie_two_to_a_byte(dtype):
    assert _traffic(lambda i, j: (i, j), dtype=dtype) == (6 * BLOCK // 4, BLOCK // 4)


def test_a_block_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="reads blocks 0 to 3 of 128 along an axis of 384"):
        _traffic(lambda i, j: (i, j + i))
