"""`encode` against ml_dtypes and NumPy, bit for bit; tables against a search in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from code_values import bits_of, code_values, every_value, FLOATS, values_of

from jaxquant.numerics import (
    as_bytes,
    BFLOAT16,
    BINARY,
    decode,
    E8M0,
    encode,
    FLOAT32,
    Format,
    FORMATS,
    round_at_random,
)
from jaxquant.numerics._cast import nearest_in_bytes

pytestmark = pytest.mark.tables

CODES = [format for format in FORMATS.values() if format.bits <= 8]
SCALES = [format for format in FORMATS.values() if format.bits > 8]
TABLES = [format for format in CODES if format.table is not None]
HALVES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
COMPILED = jax.jit(encode, static_argnums=1)
RUNS = {"eager": encode, "jit": COMPILED}
TINY = float(np.finfo(np.float32).tiny)
every_code_format = pytest.mark.parametrize("format", CODES, ids=repr)
every_run = pytest.mark.parametrize("run", RUNS)


def _nearby(values: np.ndarray) -> np.ndarray:
    """Every tie between neighbours, every value, and what is close to them, in float32."""
    ties = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    numbers = []
    for start in (ties, values.astype(np.float32)):
        # From one float32 away to what a detour by float16 or bfloat16 would round to a tie.
        for away in (0, 1, -1, 2, -2, 2**10, -(2**10), 2**14, -(2**14)):
            numbers.append((start.view(np.int32) + away).view(np.float32))
    return np.concatenate(numbers)


def _hard_numbers() -> np.ndarray:
    """Random float32 bit patterns, the neighbourhood of every format's ties, and the ends."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    numbers = [patterns, rng.standard_normal(50_000).astype(np.float32) * 100]
    for format in CODES:
        numbers.append(_nearby(every_value(format)))
        ends = np.float32([format.lowest, format.highest])
        numbers += [ends * np.float32(factor) for factor in (1.03, 1.07, 2, 1e30) if format != E8M0]
    numbers.append(np.float32([0.0, -0.0, np.inf, -np.inf, 3.4e38, -3.4e38]))
    numbers = np.concatenate(numbers)
    return numbers[~np.isnan(numbers)]


def _flushed(x: np.ndarray) -> np.ndarray:
    """XLA takes subnormal float32 for 0; NumPy must not do otherwise."""
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


HARD = _flushed(_hard_numbers())


def _expected(x: np.ndarray, format: Format) -> np.ndarray:
    """The bits of the nearest code by NumPy's rounding, by ml_dtypes' casts, or by a search."""
    x = np.clip(x, np.float32(format.lowest), np.float32(format.highest))
    if format.integer:
        return np.rint(x).astype(np.int64) & (2**format.bits - 1)
    if format.table is None:
        return x.astype(FLOATS[format.name]).view(np.uint8).astype(np.int64)
    # Middles are float32 numbers, as libraries that hold tables have them; a tie goes down.
    codes = np.argsort(code_values(format), kind="stable")
    values = code_values(format)[codes].astype(np.float32)
    middles = (values[1:] + values[:-1]) / np.float32(2)
    return codes[np.searchsorted(middles, x, side="left")]


def _assert_same(got: jax.Array, expected: np.ndarray, format: Format, x: np.ndarray):
    assert got.dtype == format.storage
    got = bits_of(np.asarray(got), format)
    wrong = got != expected
    assert not wrong.any(), (x[wrong][:5], got[wrong][:5], expected[wrong][:5])


@every_run
@every_code_format
def test_a_float32_becomes_the_nearest_code(format: Format, run: str):
    """Ties to even, in tables to the lower value."""
    _assert_same(RUNS[run](jnp.asarray(HARD), format), _expected(HARD, format), format, HARD)


def test_the_search_of_these_tests_finds_what_every_code_is_compared_with():
    x = np.linspace(-1.1, 1.1, 999).astype(np.float32)
    for format in TABLES:
        away = np.abs(code_values(format)[None] - x.astype(np.float64)[:, None])
        chosen = np.take_along_axis(away, _expected(x, format)[:, None], axis=1)[:, 0]
        np.testing.assert_array_equal(chosen, away.min(axis=1))


@pytest.mark.parametrize("format", [f for f in TABLES if f.bits < 8], ids=repr)
def test_a_tie_in_a_table_goes_to_the_lower_value(format: Format):
    values = code_values(format)
    order = np.argsort(values, kind="stable")
    for a, b in zip(order[:-1], order[1:], strict=True):
        middle = (values[a] + values[b]) / 2
        if values[a] != values[b] and np.float32(middle) == middle:
            got = encode(jnp.asarray([middle], jnp.float32), format)
            assert values[bits_of(np.asarray(got), format)[0]] == values[a], middle


@pytest.mark.parametrize("half", HALVES)
@every_code_format
def test_every_16_bit_float_becomes_the_nearest_code(format: Format, half: str):
    x = np.arange(2**16, dtype=np.uint16).view(HALVES[half])
    x = x[~np.isnan(x.astype(np.float32))]
    expected = _expected(_flushed(x.astype(np.float32)), format)
    _assert_same(COMPILED(jnp.asarray(x), format), expected, format, x)


@pytest.mark.parametrize("format", SCALES, ids=repr)
def test_a_float32_becomes_the_nearest_wide_float(format: Format):
    # Of the formats, only BFLOAT16 and FLOAT32 reach down to subnormal float32.
    x = HARD if format not in (BFLOAT16, FLOAT32) else HARD[(np.abs(HARD) >= TINY) | (HARD == 0)]
    expected = np.clip(x, np.float32(format.lowest), np.float32(format.highest))
    got = np.asarray(encode(jnp.asarray(x), format))
    bits = f"u{format.storage.itemsize}"
    np.testing.assert_array_equal(got.view(bits), expected.astype(format.storage).view(bits))


@every_run
@pytest.mark.parametrize("format", FORMATS.values(), ids=repr)
def test_infinities_meet_the_ends_and_nothing_becomes_nan(format: Format, run: str):
    x = jnp.asarray([jnp.inf, -jnp.inf, 1e38, -1e38, 470.0, -65520.0, 61440.0])
    got = values_of(np.asarray(RUNS[run](x, format)), format)
    assert np.isfinite(got).all()
    assert got[:2].tolist() == [format.highest, format.lowest]


@pytest.mark.parametrize("random", [False, True], ids=["nearest", "at random"])
@every_run
@pytest.mark.parametrize("format", FORMATS.values(), ids=repr)
def test_nan_stays_nan_in_a_format_that_has_one_and_becomes_the_least_in_others(
    format: Format, run: str, random: bool
):
    if random and format in (E8M0, FLOAT32):
        pytest.skip("it is not rounded to at random")
    key = jax.random.key(0) if random else None
    x = jnp.asarray([jnp.nan, -jnp.nan])
    got = values_of(np.asarray(RUNS[run](x, format, key)), format)
    if format.integer or format.table is not None or format.bits < 8:
        assert (got == (-1 if format == BINARY else 0)).all()
    else:
        assert np.isnan(got).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@every_code_format
def test_every_code_survives_decoding_and_encoding(format: Format, dtype: jnp.dtype):
    """Any small float or integer is exact in bfloat16 too, which has 8 significant bits."""
    expected = every_value(format)
    if format == E8M0:
        expected = expected[(expected >= format.lowest) & (expected <= format.highest)]
    codes = encode(jnp.asarray(expected, jnp.float32), format)
    decoded = decode(codes, format, dtype)
    assert decoded.dtype == dtype
    held = expected.astype(decoded.dtype)
    np.testing.assert_array_equal(decoded, held)
    if dtype == jnp.float32 or format.table is None:
        again = encode(decoded, format)
        np.testing.assert_array_equal(bits_of(again, format), bits_of(codes, format))


@every_run
@every_code_format
def test_every_code_stands_for_what_its_table_says(format: Format, run: str):
    """Codes may lie in a wider integer too."""
    values = code_values(format)
    codes = np.arange(len(values))
    if format.name in FLOATS and format.storage != np.uint8:
        stored = codes.astype(np.uint8).view(format.storage)
    elif format.signed:
        stored = (codes - 2**format.bits * (codes >= 2 ** (format.bits - 1))).astype(format.storage)
    else:
        stored = codes.astype(format.storage)
    keep = ~np.isnan(values) & (np.abs(values) >= TINY) | (values == 0) | (stored != stored)
    back = {"eager": decode, "jit": jax.jit(decode, static_argnums=(1, 2))}[run]
    got = np.asarray(back(jnp.asarray(stored[keep]), format, jnp.float32))
    np.testing.assert_array_equal(got, values[keep].astype(np.float32))
    if format.storage.kind == "u" or format.storage.name == "uint4":
        got = back(jnp.asarray(stored[keep].astype(np.int32)), format, jnp.float32)
        np.testing.assert_array_equal(got, values[keep].astype(np.float32))


@pytest.mark.parametrize("format", SCALES, ids=repr)
def test_a_scale_format_keeps_what_it_can_hold(format: Format):
    x = np.asarray([1.0, -(2.0**-14), 1.5, 60000.0], dtype=format.storage)
    got = np.asarray(encode(jnp.asarray(x), format))
    np.testing.assert_array_equal(got, x)


def test_rounding_at_random_goes_to_one_of_two_integers():
    x = jnp.asarray(np.linspace(-3, 3, 601), jnp.float32)
    got = np.asarray(round_at_random(x, jax.random.key(0)))
    exact = np.asarray(x)
    assert ((got == np.floor(exact)) | (got == np.ceil(exact))).all()
    whole = exact == np.rint(exact)
    assert (got[whole] == exact[whole]).all() and (got != np.rint(exact)).any()


@pytest.mark.parametrize("format", [E8M0, FLOAT32], ids=repr)
def test_what_has_no_gap_to_choose_in_is_not_rounded_at_random(format: Format):
    with pytest.raises(ValueError, match=f"{format} is not rounded to at random"):
        encode(jnp.ones(3), format, jax.random.key(0))


@pytest.mark.parametrize("name", ["E2M1", "E4M3", "NF4", "E3M2", "INT4", "TERNARY"])
def test_values_and_bytes_at_once_are_those_of_the_two_casts(name):
    format = FORMATS[name]
    edges = np.linspace(-1.2 * format.highest, 1.2 * format.highest, 4801)
    x = jnp.asarray(
        np.concatenate([edges, [0.0, -0.0, 0.25, -0.75, 2.5, 5.0, np.nan]]), jnp.float32
    )
    values, codes = nearest_in_bytes(x, format)
    if format.bits > 4 and not format.integer and format.table is None:
        x, values, codes = x[:-1], values[:-1], codes[:-1]  # There NaN stays NaN.
    held = encode(x, format)
    np.testing.assert_array_equal(values, decode(held, format, jnp.float32))
    np.testing.assert_array_equal(codes, as_bytes(held))
