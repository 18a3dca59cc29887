"""What the convolution accepts; what it computes is in tests/laws/test_convolutions.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantized import normal, SCHEMES

from jaxquant.ops import conv_general_dilated, Refusal
from jaxquant.ops.conv import BACKENDS
from jaxquant.qarray import quantize_array

X, W = normal(2, 6, 6, 4), normal(3, 3, 4, 8)
Q = quantize_array(W, SCHEMES["int8 channel"], contracted=(0, 1, 2))
NUMBERS = ("NHWC", "HWIO", "NHWC")


def test_the_signature_is_that_of_lax():
    expected = jax.lax.conv_general_dilated(
        X, W, (2, 1), ((1, 1), (0, 2)), (1, 2), (2, 1), NUMBERS, 1, 1, jax.lax.Precision.HIGHEST
    )
    got = conv_general_dilated(
        X, Q, (2, 1), ((1, 1), (0, 2)), (1, 2), (2, 1), NUMBERS, 1, 1, jax.lax.Precision.HIGHEST
    )
    # 36 products of weights that are wrong by half a step: peaks of Gaussians, less than 4 of 254.
    np.testing.assert_allclose(got, expected, atol=36 * 4 * 4 / 254)
    first = jax.lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
    named = conv_general_dilated(X, Q, (1, 1), "SAME", dimension_numbers=NUMBERS)
    given = conv_general_dilated(X, Q, (1, 1), "SAME", dimension_numbers=first)
    np.testing.assert_array_equal(named, given)


def test_left_out_dimension_numbers_are_those_of_lax():
    x, w = X.transpose(0, 3, 1, 2), W.transpose(3, 2, 0, 1)
    q = quantize_array(w, SCHEMES["int8 channel"], contracted=(1, 2, 3))
    assert conv_general_dilated(x, q, (1, 1), "VALID").shape == (2, 8, 4, 4)


def test_the_reference_comes_last_and_takes_every_call():
    assert list(BACKENDS)[-1] == "reference"
    mixed = quantize_array(X, SCHEMES["e4m3 channel"], contracted=(1, 2, 3))
    with pytest.raises(Refusal, match="'xla' of conv refuses: .*not E4M3 with INT8"):
        conv_general_dilated(mixed, Q, (1, 1), "SAME", dimension_numbers=NUMBERS, backend="xla")
    y = conv_general_dilated(mixed, Q, (1, 1), "SAME", dimension_numbers=NUMBERS)
    z = conv_general_dilated(
        mixed, Q, (1, 1), "SAME", dimension_numbers=NUMBERS, backend="reference"
    )
    np.testing.assert_array_equal(y, z)


def test_an_unknown_backend_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="no backend named 'cudnn'. It has: xla, reference"):
        conv_general_dilated(X, Q, (1, 1), "SAME", dimension_numbers=NUMBERS, backend="cudnn")


def test_a_broken_qarray_is_refused_before_it_is_used():
    broken = dataclasses.replace(Q, scale=jnp.ones((3, 1, 1, 5)))
    with pytest.raises(ValueError, match="cannot tile"):
        conv_general_dilated(X, broken, (1, 1), "SAME", dimension_numbers=NUMBERS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_result_has_the_wider_dtype_or_the_one_that_is_asked_for(backend: str):
    def run(**keywords):
        return conv_general_dilated(
            X, Q, (1, 1), "SAME", dimension_numbers=NUMBERS, backend=backend, **keywords
        )

    assert run().dtype == jnp.float32
    assert run(out_dtype=jnp.bfloat16).dtype == jnp.bfloat16
