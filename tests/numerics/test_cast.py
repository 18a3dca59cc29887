"""`encode` against ml_dtypes and NumPy, bit for bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxquant.numerics import decode, encode, Format, FORMATS

CODES = [format for format in FORMATS.values() if format.bits <= 8]
SCALES = [format for format in FORMATS.values() if format.bits > 8]
HALVES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
RUNS = {"eager": encode, "jit": jax.jit(encode, static_argnums=1)}
TINY = float(np.finfo(np.float32).tiny)


def _every_value(format: Format) -> np.ndarray:
    """The finite values of a format of at most 8 bits, in increasing order, 0 once."""
    if format.integer:
        return np.arange(format.lowest, format.highest + 1)
    codes = np.arange(256, dtype=np.uint8).view(format.storage).astype(np.float64)
    return np.unique(codes[np.isfinite(codes)])


def _hard_numbers() -> np.ndarray:
    """1e6 float32 bit patterns, every tie of every format with its neighbours, and the ends."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 2**32, 1_000_000, dtype=np.uint32).view(np.float32)
    numbers = [patterns, rng.standard_normal(100_000).astype(np.float32) * 100]
    for format in CODES:
        values = _every_value(format)
        ties = ((values[1:] + values[:-1]) / 2).astype(np.float32)
        for start in (ties, values.astype(np.float32)):
            # From one float32 away to what a detour by float16 or bfloat16 would round to a tie.
            for away in (0, 1, -1, 2, -2, 2**10, -(2**10), 2**14, -(2**14)):
                numbers.append((start.view(np.int32) + away).view(np.float32))
        ends = np.float32([format.lowest, format.highest])
        numbers += [ends * np.float32(factor) for factor in (1.03, 1.07, 2, 1e30)]
    numbers.append(np.float32([0.0, -0.0, np.inf, -np.inf, 3.4e38, -3.4e38]))
    numbers = np.concatenate(numbers)
    return numbers[~np.isnan(numbers)]


HARD = _hard_numbers()


def _expected(x: np.ndarray, format: Format) -> np.ndarray:
    x = np.clip(x, np.float32(format.lowest), np.float32(format.highest))
    return (np.rint(x) if format.integer else x).astype(format.storage)


def _assert_same(got: jax.Array, expected: np.ndarray, x: np.ndarray):
    bits = f"u{expected.dtype.itemsize}"
    wrong = np.asarray(got).view(bits) != expected.view(bits)
    assert not wrong.any(), (x[wrong][:5], np.asarray(got)[wrong][:5], expected[wrong][:5])


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("format", FORMATS.values(), ids=repr)
def test_a_float32_becomes_the_nearest_code_ties_to_even(format: Format, run: str):
    # XLA takes subnormal float32 for 0: of the formats, only BFLOAT16 and FLOAT32 reach down there.
    x = HARD if format.highest < 1e38 else HARD[(np.abs(HARD) >= TINY) | (HARD == 0)]
    _assert_same(RUNS[run](jnp.asarray(x), format), _expected(x, format), x)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("format", CODES, ids=repr)
def test_every_16_bit_float_becomes_the_nearest_code(format: Format, half: str, run: str):
    x = np.arange(2**16, dtype=np.uint16).view(HALVES[half])
    x = x[~np.isnan(x.astype(np.float32))]
    expected = _expected(x.astype(np.float32), format)
    _assert_same(RUNS[run](jnp.asarray(x), format), expected, x)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("format", FORMATS.values(), ids=repr)
def test_infinities_meet_the_ends_and_nothing_becomes_nan(format: Format, run: str):
    x = jnp.asarray([jnp.inf, -jnp.inf, 1e38, -1e38, 470.0, -65520.0, 61440.0])
    got = np.asarray(RUNS[run](x, format)).astype(np.float64)
    assert np.isfinite(got).all()
    assert got[:2].tolist() == [format.highest, format.lowest]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("format", FORMATS.values(), ids=repr)
def test_nan_stays_nan_in_a_float_format_and_becomes_0_in_an_integer_one(format: Format, run: str):
    got = np.asarray(RUNS[run](jnp.asarray([jnp.nan, -jnp.nan]), format)).astype(np.float64)
    assert (got == 0).all() if format.integer else np.isnan(got).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("format", CODES, ids=repr)
def test_every_code_survives_decoding_and_encoding(format: Format, dtype: jnp.dtype):
    """Any 8-bit code is exact in bfloat16 too, which has 8 significant bits."""
    expected = _every_value(format)
    codes = jnp.asarray(expected.astype(format.storage))
    decoded = decode(codes, jnp.dtype(dtype))
    assert decoded.dtype == dtype
    np.testing.assert_array_equal(np.asarray(decoded).astype(np.float64), expected)
    _assert_same(encode(decoded, format), np.asarray(codes), expected)


@pytest.mark.parametrize("format", SCALES, ids=repr)
def test_a_scale_format_keeps_what_it_can_hold(format: Format):
    x = np.asarray([1.0, -(2.0**-14), 1.5, 60000.0], dtype=format.storage)
    _assert_same(encode(jnp.asarray(x), format), x, x)
