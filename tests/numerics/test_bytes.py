"""4-bit codes through bytes: the same codes, where the array was, whatever makes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxquant.numerics import as_bytes, E2M1, from_bytes, INT4, INT8, UINT4

NARROW = [INT4, UINT4, E2M1]


def codes_of(format):
    """Every code of a format of 4 bits, in two rows."""
    bits = jnp.arange(16, dtype=jnp.uint8).reshape(2, 8)
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint4), format.storage)


@pytest.mark.parametrize("format", NARROW, ids=str)
def test_every_code_comes_back(format):
    codes = codes_of(format)
    held = jax.jit(as_bytes)(codes)
    assert held.dtype.itemsize == 1 and held.dtype.kind in "iu"
    back = from_bytes(held, format)
    assert back.dtype == format.storage and not back.committed
    np.testing.assert_array_equal(back, codes)


def test_bytes_are_values_of_integers_and_bits_of_floats():
    np.testing.assert_array_equal(as_bytes(codes_of(INT4))[1], np.arange(-8, 0))
    np.testing.assert_array_equal(as_bytes(codes_of(E2M1))[1], np.arange(8, 16))


def test_wider_codes_are_what_they_were():
    codes = jnp.arange(-4, 4, dtype=jnp.int8)
    assert as_bytes(codes) is codes and from_bytes(codes, INT8) is codes


@pytest.mark.parametrize("format", NARROW, ids=str)
def test_sharded_codes_stay_where_they_are(format):
    sharding = NamedSharding(jax.make_mesh((2,), ("x",)), P("x"))
    held = jax.device_put(jax.jit(as_bytes)(codes_of(format)), sharding)
    back = from_bytes(held, format)
    assert back.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(back, codes_of(format))


def test_what_was_put_on_a_device_stays_on_it():
    device = jax.devices()[1]
    held = jax.device_put(as_bytes(codes_of(INT4)), device)
    back = from_bytes(held, INT4)
    assert back.committed and back.devices() == {device}
