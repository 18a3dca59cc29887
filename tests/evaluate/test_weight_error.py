"""Errors of weights by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.evaluate import weight_error, WeightError
from jaxquant.numerics import INT4, INT8
from jaxquant.qarray import dequantize, PER_CHANNEL, quantize_array, Scheme


@pytest.mark.parametrize("values", [INT8, INT4])
def test_numpy_finds_the_same(values):
    w = jax.random.normal(jax.random.key(0), (64, 32))
    q = quantize_array(w, Scheme(values=values, tile=PER_CHANNEL), contracted=(0,))
    off = np.asarray(dequantize(q), np.float64) - np.asarray(w, np.float64)
    expected = np.linalg.norm(off) / np.linalg.norm(np.asarray(w, np.float64))
    error = weight_error(w, q)
    assert error.relative == pytest.approx(expected, rel=1e-4)
    assert error.largest == pytest.approx(np.abs(off).max(), rel=1e-4)
    assert error.snr_db == pytest.approx(-20 * np.log10(expected), rel=1e-4)


def test_eight_bits_are_some_24_decibels_better_than_four():
    w = jax.random.normal(jax.random.key(0), (256, 256))

    def decibels(values):
        scheme = Scheme(values=values, tile=PER_CHANNEL)
        return weight_error(w, quantize_array(w, scheme, contracted=(0,))).snr_db

    assert decibels(INT8) - decibels(INT4) == pytest.approx(20 * np.log10(127 / 7), abs=1)


def test_no_error_and_no_signal_are_no_numbers():
    zeros = jnp.zeros((4, 4))
    q = quantize_array(zeros, Scheme(values=INT8, tile=PER_CHANNEL), contracted=(0,))
    assert weight_error(zeros, q) == WeightError(relative=0.0, largest=0.0)
    assert weight_error(zeros, q).snr_db is None


def test_another_shape_is_refused():
    zeros = jnp.zeros((4, 4))
    q = quantize_array(zeros, Scheme(values=INT8, tile=PER_CHANNEL), contracted=(0,))
    with pytest.raises(ValueError, match=r"\(2, 8\) cannot be compared with one of \(4, 4\)"):
        weight_error(zeros.reshape(2, 8), q)
