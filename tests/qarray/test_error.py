"""Errors of weights by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.numerics import INT4, INT8, MinMax, UINT4
from jaxquant.qarray import (
    dequantize,
    PER_CHANNEL,
    quantize_array,
    Scheme,
    schemes,
    Tile,
    weight_error,
    WeightError,
)
from jaxquant.qarray._error import array_error


@pytest.mark.parametrize("values", [INT8, INT4])
def test_numpy_finds_the_same(values):
    w = jax.random.normal(jax.random.key(0), (64, 32))
    q = quantize_array(w, Scheme(values=values, tile=PER_CHANNEL), contracted=(0,))
    off = np.asarray(dequantize(q), np.float64) - np.asarray(w, np.float64)
    expected = np.linalg.norm(off) / np.linalg.norm(np.asarray(w, np.float64))
    error = weight_error(w, q)
    assert error.relative == pytest.approx(expected, rel=1e-4)
    assert error.largest == pytest.approx(np.abs(off).max(), rel=1e-4)
    assert error.sqnr_db == pytest.approx(-20 * np.log10(expected), rel=1e-4)


def test_eight_bits_are_some_24_decibels_better_than_four():
    w = jax.random.normal(jax.random.key(0), (256, 256))

    def decibels(values):
        scheme = Scheme(values=values, tile=PER_CHANNEL)
        return weight_error(w, quantize_array(w, scheme, contracted=(0,))).sqnr_db

    assert decibels(INT8) - decibels(INT4) == pytest.approx(20 * np.log10(127 / 7), abs=1)


def test_no_error_and_no_signal_are_no_numbers():
    zeros = jnp.zeros((4, 4))
    q = quantize_array(zeros, Scheme(values=INT8, tile=PER_CHANNEL), contracted=(0,))
    assert weight_error(zeros, q) == WeightError(relative=0.0, largest=0.0)
    assert weight_error(zeros, q).sqnr_db is None


@pytest.mark.parametrize("factor", [1.0, 2.0**-100, 2.0**90])
def test_numbers_are_measured_as_codes_are(factor):
    w = jax.random.normal(jax.random.key(0), (64, 32)) * factor
    q = quantize_array(w, Scheme(values=INT4, tile=PER_CHANNEL), contracted=(0,))
    wanted, error = weight_error(w, q), array_error(w, dequantize(q))
    assert error.relative == pytest.approx(wanted.relative, rel=1e-5)
    assert error.largest == pytest.approx(wanted.largest, rel=1e-5)
    assert array_error(jnp.zeros(3), jnp.zeros(3)) == WeightError(relative=0.0, largest=0.0)


def test_another_shape_is_refused():
    zeros = jnp.zeros((4, 4))
    q = quantize_array(zeros, Scheme(values=INT8, tile=PER_CHANNEL), contracted=(0,))
    with pytest.raises(ValueError, match=r"\(2, 8\) cannot be compared with one of \(4, 4\)"):
        weight_error(zeros.reshape(2, 8), q)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(values=UINT4, tile=Tile(contracted=16), range=MinMax(), zero_point=UINT4),
        Scheme(values=INT4, tile=Tile(contracted=24, ragged=True)),
        Scheme(values=INT8, tile=Tile(contracted=16, kept=8)),
        schemes.NF4,
        schemes.NF4_DOUBLE,
        schemes.NVFP4,
        schemes.MXFP4,
    ],
    ids=str,
)
def test_every_kind_of_scheme_is_measured_by_what_it_dequantizes_to(scheme):
    w = 3 + jax.random.normal(jax.random.key(0), (64, 64))
    q = quantize_array(w, scheme, contracted=(0,))
    off = np.asarray(dequantize(q), np.float64) - np.asarray(w, np.float64)
    error = weight_error(w, q)
    assert error.relative == pytest.approx(np.linalg.norm(off) / np.linalg.norm(w), rel=1e-4)
    assert error.largest == pytest.approx(np.abs(off).max(), rel=1e-4)


@pytest.mark.parametrize("exponent", [-100, -60, 60, 100])
def test_tiny_and_huge_weights_have_the_error_of_ordinary_ones(exponent):
    w = jax.random.normal(jax.random.key(0), (64, 32))
    scheme = Scheme(values=INT4, tile=Tile(contracted=16))

    def error(w):
        return weight_error(w, quantize_array(w, scheme, contracted=(0,)))

    # A power of two changes no digit, and squares of these numbers are not float32 numbers.
    plain, moved = error(w), error(w * 2.0**exponent)
    assert moved.relative == pytest.approx(plain.relative, rel=1e-5)
    assert moved.largest == pytest.approx(plain.largest * 2.0**exponent, rel=1e-5)


def test_a_stack_has_the_error_of_all_its_slices():
    w = jax.random.normal(jax.random.key(0), (3, 64, 32))
    scheme = Scheme(values=INT4, tile=Tile(contracted=16))
    q = quantize_array(w, scheme, contracted=(1,), stack=(0,))
    parts = [weight_error(w[i], q[i]) for i in range(3)]
    squares = [(part.relative * np.linalg.norm(w[i])) ** 2 for i, part in enumerate(parts)]
    whole = weight_error(w, q)
    assert whole.relative == pytest.approx(np.sqrt(sum(squares)) / np.linalg.norm(w), rel=1e-5)
    assert whole.largest == max(part.largest for part in parts)


def test_vectors_and_scalars_of_one_value_are_measured():
    w = jnp.asarray([0.3, -1.0, 0.5])
    q = quantize_array(w, Scheme(values=INT8, tile=PER_CHANNEL), contracted=(0,))
    assert weight_error(w, q).sqnr_db == pytest.approx(
        10 * np.log10(np.square(w).sum() / np.square(dequantize(q) - w).sum()), rel=1e-4
    )
