"""Both forms of the product against its definition, and against each other."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from outlier_products import call_of, CASES
from quantized import same_bits

from jaxquant.ops import dot_general, Outliers, quantize_activation
from jaxquant.ops.outliers import _reference
from jaxquant.ops.outliers._xla import gathers, refuses, run


def _bound(call):
    """Of sums of k products in float32, in whatever order."""
    x = jnp.abs(call.x).max()
    w = jnp.abs(call.w.scale).max() * 256
    return float(call.sizes[1] * call.sizes[1] ** 0.5 * 2.0**-22 * x * w)


@pytest.mark.parametrize("known", [0, 5], ids=["dequantized", "original"])
@pytest.mark.parametrize("columns", [None, 1, 6], ids=["mask", "too many", "gather"])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_reference(name, columns, known):
    call = call_of(name, Outliers(columns=columns), known=known)
    assert refuses(call) is None
    got = jax.jit(lambda: run(call))()
    want = _reference.run(call)
    assert got.shape == want.shape and got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=0, atol=_bound(call))


def test_the_gather_computes_on_the_columns_that_are_apart_and_the_mask_on_more():
    """A weight of NaN in a column that is not apart shows in the mask alone: 0 * NaN is NaN."""
    for columns, spoiled in ((6, False), (1, True), (None, True)):
        call = call_of("e4m3", Outliers(columns=columns))
        place = 10
        assert not bool(call.in_columns(call.big())[0, place])
        w = dataclasses.replace(call.w, codes=call.w.codes.at[place].set(jnp.nan))
        call = dataclasses.replace(call, dot=dataclasses.replace(call.dot, rhs=w))
        # What is rounded meets the column too: so only the part in floats is looked at.
        from jaxquant.ops.outliers._xla import _unknown

        y = _unknown(call, call.in_columns(call.big()))
        assert bool(jnp.isnan(y).any()) == spoiled


def test_what_can_be_gathered():
    assert [name for name in CASES if not gathers(call_of(name))] == ["several axes", "batched"]


@pytest.mark.parametrize("columns", [None, 6, 64])
def test_with_a_threshold_of_0_it_is_the_product_of_what_the_codes_stand_for(columns):
    call = call_of("matrix", Outliers(threshold=0.0, columns=columns))
    want = dot_general(call.x, call.w, call.dot.dimension_numbers, backend="reference")
    np.testing.assert_allclose(run(call), want, rtol=0, atol=_bound(call))


@pytest.mark.parametrize("columns", [None, 6])
def test_without_outliers_it_is_the_product_of_codes_to_the_bit(columns):
    call = call_of("matrix", Outliers(threshold=math.inf, columns=columns))
    q = quantize_activation(call.x, call.activations, contracted=(1,))
    want = dot_general(q, call.w, call.dot.dimension_numbers)
    assert same_bits(run(call), want)


def test_it_stands_half_precision():
    call = call_of("matrix", Outliers(columns=6), known=5)
    half = call.dot.lhs.astype(jnp.bfloat16)
    call = dataclasses.replace(
        call, dot=dataclasses.replace(call.dot, lhs=half, out_dtype=jnp.dtype(jnp.bfloat16))
    )
    got, want = run(call), _reference.run(call)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        got.astype(jnp.float32), want.astype(jnp.float32), rtol=2.0**-7, atol=2.0**-7 * 30
    )


def test_it_is_not_differentiated():
    call = call_of("matrix")

    def loss(x):
        return run(dataclasses.replace(call, dot=dataclasses.replace(call.dot, lhs=x))).sum()

    with pytest.raises(TypeError, match="rounding has no useful gradient"):
        jax.grad(loss)(call.x)


def test_it_is_vmapped_with_columns_of_each_entry():
    call = call_of("matrix", Outliers(columns=3))
    xs = jnp.stack([call.x, call.x[:, ::-1], 0 * call.x])

    def one(x):
        return run(dataclasses.replace(call, dot=dataclasses.replace(call.dot, lhs=x)))

    np.testing.assert_allclose(
        jax.vmap(one)(xs), jnp.stack(list(map(one, xs))), rtol=0, atol=_bound(call)
    )
