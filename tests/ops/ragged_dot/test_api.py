"""What the ragged product accepts; what it computes is in tests/laws/test_ragged_dots.py."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from quantized import normal, SCHEMES

from jaxquant.ops import ragged_dot, Refusal
from jaxquant.ops.ragged_dot import BACKENDS
from jaxquant.qarray import quantize_array

X, SIZES = normal(6, 64), jnp.asarray([2, 0, 3], jnp.int32)
Q = quantize_array(normal(3, 64, 8), SCHEMES["int8 channel"], contracted=(1,), stack=(0,))


def test_the_reference_comes_last_and_takes_every_call():
    assert list(BACKENDS)[-1] == "reference"
    mixed = quantize_array(X, SCHEMES["e4m3 channel"])
    with pytest.raises(Refusal, match="'xla' of ragged_dot refuses: .*not E4M3 with INT8"):
        ragged_dot(mixed, Q, SIZES, backend="xla")
    np.testing.assert_array_equal(
        ragged_dot(mixed, Q, SIZES), ragged_dot(mixed, Q, SIZES, backend="reference")
    )


def test_an_unknown_backend_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="no backend named 'gmm'. It has: xla, reference"):
        ragged_dot(X, Q, SIZES, backend="gmm")


@pytest.mark.parametrize("x, sizes", [(X[:, :32], SIZES), (X[0], SIZES), (X, SIZES[:2])])
def test_shapes_that_do_not_fit_are_named(x, sizes):
    with pytest.raises(ValueError, match=r"rows \[M, K\] with experts \[E, K, N\].*\(3, 64, 8\)"):
        ragged_dot(x, Q, sizes)


def test_a_broken_qarray_is_refused_before_it_is_used():
    with pytest.raises(ValueError, match="cannot tile"):
        ragged_dot(X, dataclasses.replace(Q, scale=jnp.ones((2, 1, 8))), SIZES)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_result_has_the_wider_dtype_or_the_one_that_is_asked_for(backend: str):
    assert ragged_dot(X, Q, SIZES, backend=backend).dtype == jnp.float32
    half = ragged_dot(X, Q, SIZES, out_dtype=jnp.bfloat16, backend=backend)
    assert half.dtype == jnp.bfloat16
