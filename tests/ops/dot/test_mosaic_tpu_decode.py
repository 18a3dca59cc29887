"""Each decoder gives every code, in the order and with the constant that it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.numerics import INT1, INT2, INT3, NF4, pack, TERNARY, UINT2, UINT3
from jaxquant.ops._pallas import interpreted
from jaxquant.ops.dot._mosaic_tpu_decode import Bias11, Cast, Lookup, Nibbles, Packed, row_of

ROWS = 128


def _codes(lowest: int, highest: int, columns: int) -> np.ndarray:
    """Every code in every row of a word, and others."""
    codes = np.random.default_rng(0).integers(lowest, highest + 1, (2 * ROWS, columns))
    codes[:, : highest - lowest + 1] = np.arange(lowest, highest + 1)
    return codes


def _decoded(decoder, stored: jax.Array, columns: slice) -> np.ndarray:
    width = columns.stop - columns.start

    def kernel(ref, out):
        out[...] = decoder.decode(ref, ROWS, ROWS, columns).astype(jnp.bfloat16)

    shape = jax.ShapeDtypeStruct((ROWS, width), jnp.bfloat16)
    return np.asarray(interpreted(kernel, shape)(stored)).astype(np.float64)


def _check(decoder, stored: jax.Array, values: np.ndarray, columns: slice):
    order = np.asarray(row_of(jnp.arange(ROWS), ROWS, decoder.pieces))
    assert sorted(order) == list(range(ROWS))
    expected = values[ROWS:][order, columns] + decoder.offset
    np.testing.assert_array_equal(_decoded(decoder, stored, columns), expected)


@pytest.mark.parametrize("dtype, lowest", [(jnp.int4, -8), (jnp.uint4, 0)])
@pytest.mark.parametrize("cast", [True, False], ids=["cast", "nibbles"])
def test_four_bits(cast: bool, dtype, lowest: int):
    codes = _codes(lowest, lowest + 15, 256)
    decoder = Cast() if cast else Nibbles(signed=lowest < 0)
    _check(decoder, jnp.asarray(codes, jnp.int8).astype(dtype), codes, slice(0, 128))


def test_e4m3_as_the_one_of_exponents_biased_by_11():
    """Every code that is no NaN, -0 too, which stands for NaN there."""
    codes = _codes(0, 255, 256) & 0xFF
    codes[(codes & 0x7F) == 0x7F] = 0x80
    assert (codes == 0x80).any()
    stored = jnp.asarray(codes, jnp.uint8).view(jnp.float8_e4m3fn)
    decoder = Bias11()
    values = np.asarray(stored).astype(np.float64) / decoder.factor
    _check(decoder, stored, values, slice(0, 256))


@pytest.mark.parametrize("format", [INT1, INT2, UINT2, TERNARY, INT3, UINT3], ids=str)
def test_packed(format):
    block = 1024 if format.bits in (1, 3) else 512
    codes = _codes(int(format.lowest), int(format.highest), 2 * block)
    stored = pack(jnp.asarray(codes, format.storage), format, block)
    decoder = Packed(format=format, block=block)
    assert stored.shape[1] == decoder.columns(2 * block)
    _check(decoder, stored, codes, slice(0, 2 * block))
    _check(decoder, stored, codes, slice(block, 2 * block))


def test_a_table_is_rounded_to_bfloat16():
    codes = _codes(0, 15, 256)
    assert NF4.table is not None
    values = np.asarray(NF4.table, np.float32).astype(jnp.bfloat16).astype(np.float64)[codes]
    _check(Lookup(table=NF4.table), jnp.asarray(codes, jnp.uint4), values, slice(128, 256))


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_rows_come_two_to_a_word_as_far_apart_as_there_are_pieces(pieces: int):
    order = np.asarray(row_of(jnp.arange(64), 64, pieces))
    if pieces == 1:
        assert (order == np.arange(64)).all()
        return
    assert (order[1::2] - order[::2] == pieces).all()
    # The two lie in one word of `2 pieces` rows.
    assert (order[1::2] // (2 * pieces) == order[::2] // (2 * pieces)).all()
