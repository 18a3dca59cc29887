import jax
import jax.numpy as jnp
import numpy as np
import pytest
from code_values import bits_of, FLOATS, unpacked

from jaxquant.numerics import (
    BINARY,
    E2M1,
    E3M2,
    Format,
    FORMATS,
    INT2,
    INT3,
    INT4,
    INT5,
    INT8,
    least_block,
    NF4,
    pack,
    packed_size,
    TERNARY,
    UINT4,
    UINT6,
    unpack,
)
from jaxquant.numerics._pack import widths

PACKING = [format for format in FORMATS.values() if format.packs]
every_packing = pytest.mark.parametrize("format", PACKING, ids=repr)


def _stored(bits: np.ndarray, format: Format) -> np.ndarray:
    """Codes of the given bits, in the dtype that holds codes of `format`."""
    if format.name in FLOATS and format.storage != np.uint8:
        return bits.astype(np.uint8).view(format.storage)
    if format.signed:
        bits = bits - 2**format.bits * (bits >= 2 ** (format.bits - 1))
    return bits.astype(format.storage)


# Format, codes, block, bytes: written by hand.
BY_HAND = [
    # Halves apart, the first half in the low nibbles, two's complement.
    (INT4, [0, 1, -8, 7, -1, 2, 3, -2], 8, [0xF0, 0x21, 0x38, 0xE7]),
    (INT4, [0, 1, -8, 7, -1, 2, 3, -2], 4, [0x80, 0x71, 0x3F, 0xE2]),
    (INT4, [0, 1, -8, 7, -1, 2, 3, -2], 2, [0x10, 0x78, 0x2F, 0xE3]),
    (UINT4, [1, 2, 14, 15], 4, [0xE1, 0xF2]),
    (NF4, [1, 2, 14, 15], 4, [0xE1, 0xF2]),
    # 0.5, 6, -0.5 and -6 are the codes 1, 7, 9 and 15.
    (E2M1, [0.5, 6, -0.5, -6], 4, [0x91, 0xF7]),
    # Quarters apart.
    (INT2, [0, 1, -2, -1, 1, 0, -1, -2], 8, [0b11_01_10_00, 0b10_00_11_01]),
    (TERNARY, [0, 1, -1, 0], 4, [0b00_11_01_00]),
    # Eighths apart.
    (BINARY, [0, 1, 1, 0, 0, 0, 0, 1], 8, [0b1000_0110]),
    (BINARY, [1, 0] * 7 + [1, 1], 16, [0xFF, 0x80]),
    # The low two bits first, then the high one: 0, 1, 2, 3, -4, -3, -2, -1 are 0 to 7.
    (INT3, [0, 1, 2, 3, -4, -3, -2, -1], 8, [0b10_00_10_00, 0b11_01_11_01, 0b1111_0000]),
    # The low four, then the fifth: 5 is 00101, -16 is 10000, -1 is 11111.
    (INT5, [5, -16, -1, 0, 0, 0, 0, -16], 8, [0x05, 0x00, 0x0F, 0x00, 0b1000_0110]),
    # The low four, then the high two: 0x1B is 01 1011, 0x3F is 11 1111.
    (UINT6, [0x1B, 0x3F, 0x00, 0x20], 4, [0x0B, 0x0F, 0b10_00_11_01]),
    (E3M2, [0x1B, 0x3F, 0x00, 0x20], 4, [0x0B, 0x0F, 0b10_00_11_01]),
]


@pytest.mark.parametrize("format, codes, block, expected", BY_HAND)
def test_the_bytes_are_as_written_by_hand(format: Format, codes, block: int, expected):
    held = jnp.asarray(np.asarray(codes).astype(format.storage))
    assert np.asarray(pack(held, format, block)).tolist() == expected
    back = unpack(jnp.asarray(expected, jnp.uint8), format, block)
    np.testing.assert_array_equal(bits_of(back, format), bits_of(held, format))


@pytest.mark.parametrize(
    "format, run",
    [*((f, jax.jit) for f in PACKING), (INT3, jax.vmap)],
    ids=[*map(repr, PACKING), "INT3-vmap"],
)
def test_unpacking_and_packing_gives_every_byte_back(format: Format, run):
    """Each byte stands at each of several places; blocks are all, some and as small as may be."""
    size = 256 * format.bits
    every = np.resize(np.arange(256, dtype=np.uint8), size)
    packed = np.stack([np.roll(every, shift) for shift in (0, 1, 7)])
    codes = 8 * size // format.bits
    for block in (codes, codes // 8, least_block(format)):
        got = run(lambda p, block=block: unpack(p, format, block))(jnp.asarray(packed))
        assert got.dtype == format.storage and got.shape == (3, codes)
        np.testing.assert_array_equal(bits_of(got, format), unpacked(packed, format.bits, block))
        again = run(lambda c, block=block: pack(c, format, block))(got)
        np.testing.assert_array_equal(again, packed)


@every_packing
def test_packing_and_unpacking_gives_every_code_back(format: Format):
    bits = np.random.default_rng(0).integers(0, 2**format.bits, (3, 2, 256))
    codes = _stored(bits, format)
    for block in (256, least_block(format)):
        packed = jax.jit(pack, static_argnums=(1, 2))(jnp.asarray(codes), format, block)
        assert packed.dtype == np.uint8
        assert packed.shape == (3, 2, packed_size(256, format)) == (3, 2, 32 * format.bits)
        np.testing.assert_array_equal(bits_of(unpack(packed, format, block), format), bits)
        if format.integer:
            for dtype in (np.int16, np.float32):
                got = unpack(packed, format, block, np.dtype(dtype))
                assert got.dtype == dtype
                np.testing.assert_array_equal(np.asarray(got), codes.astype(np.float32))


@pytest.mark.parametrize("format", [INT3, INT4, UINT6], ids=repr)
def test_codes_may_come_in_a_wider_integer(format: Format):
    bits = np.random.default_rng(0).integers(0, 2**format.bits, 64)
    codes = _stored(bits, format)
    wide = jnp.asarray(codes.astype(np.int8))
    np.testing.assert_array_equal(pack(wide, format, 64), pack(jnp.asarray(codes), format, 64))


@every_packing
def test_parts_are_powers_of_two_that_add_up(format: Format):
    parts = widths(format)
    assert sum(parts) == format.bits and set(parts) <= {1, 2, 4}
    assert least_block(format) * min(parts) == 8


@pytest.mark.parametrize("block", [0, 1, 3, 10, 24])
def test_blocks_that_do_not_fill_the_axis_are_refused(block: int):
    message = (
        f"axis of 16 codes of INT4 cannot be packed in blocks of {block}: blocks are multiples of "
        "2 and divide the axis. Leave it unpacked, or use such a divisor of 16"
    )
    with pytest.raises(ValueError, match=message):
        pack(jnp.zeros((2, 16), jnp.int4), INT4, block)
    with pytest.raises(ValueError, match=message):
        unpack(jnp.zeros((2, 8), jnp.uint8), INT4, block)


@pytest.mark.parametrize("format, block", [(INT3, 4), (INT2, 2), (UINT6, 2), (BINARY, 4)])
def test_blocks_that_do_not_fill_bytes_with_each_part_are_refused(format: Format, block: int):
    with pytest.raises(ValueError, match=f"blocks are multiples of {least_block(format)}"):
        pack(jnp.zeros(16, format.storage), format, block)


def test_codes_of_whole_bytes_are_not_packed():
    with pytest.raises(ValueError, match="Codes of INT8 fill whole bytes; there is nothing"):
        pack(jnp.zeros(16, jnp.int8), INT8, 2)
