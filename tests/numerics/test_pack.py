import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxquant.numerics import pack, unpack

BYTES = np.arange(256, dtype=np.uint8)
BLOCKS = [2, 4, 32, 128, 512]


def test_the_bytes_are_as_written_by_hand():
    """Halves apart, the first half in the low nibbles, two's complement."""
    codes = jnp.asarray([0, 1, -8, 7, -1, 2, 3, -2], jnp.int4)
    assert np.asarray(pack(codes, 8)).tolist() == [0xF0, 0x21, 0x38, 0xE7]
    assert np.asarray(pack(codes, 4)).tolist() == [0x80, 0x71, 0x3F, 0xE2]
    assert np.asarray(pack(codes, 2)).tolist() == [0x10, 0x78, 0x2F, 0xE3]


@pytest.mark.parametrize("run", [lambda f: f, jax.jit, jax.vmap], ids=["eager", "jit", "vmap"])
@pytest.mark.parametrize("block", BLOCKS)
def test_unpacking_and_packing_gives_every_byte_back(block: int, run):
    # Each byte stands at each of several places of a block.
    packed = jnp.asarray(np.stack([np.roll(BYTES, shift) for shift in (0, 1, 7)]))
    codes = run(lambda p: unpack(p, block))(packed)
    assert codes.dtype == ml_dtypes.int4 and codes.shape == (3, 512)
    again = run(lambda c: pack(c, block))(codes)
    np.testing.assert_array_equal(again, packed)


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, np.int8, np.float32])
@pytest.mark.parametrize("block", BLOCKS)
def test_packing_and_unpacking_gives_every_code_back(block: int, dtype: type):
    codes = np.random.default_rng(0).integers(-8, 8, (3, 2, 512)).astype(np.int8)
    packed = pack(jnp.asarray(codes), block)
    assert packed.dtype == np.uint8 and packed.shape == (3, 2, 256)
    got = unpack(packed, block, np.dtype(dtype))
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.asarray(got).astype(np.int8), codes)


@pytest.mark.parametrize("block", [0, 1, 3, 10, 24])
def test_blocks_that_do_not_fill_the_axis_are_refused(block: int):
    message = f"16 codes cannot be packed in blocks of {block}.*even divisor of 16"
    with pytest.raises(ValueError, match=message):
        pack(jnp.zeros((2, 16), jnp.int4), block)
    with pytest.raises(ValueError, match=message):
        unpack(jnp.zeros((2, 8), jnp.uint8), block)
