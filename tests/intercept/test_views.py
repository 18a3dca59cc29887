"""A view of a weight is the same view of its array, quantized or not; other operations are none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant as jq
from jaxquant.intercept._views import VIEWS
from jaxquant.intercept._weight import whole

ARRAY = jax.random.normal(jax.random.key(0), (4, 8, 6))
Q = jq.quantize_array(
    ARRAY, jq.Scheme(values=jq.INT8, tile=jq.Tile(contracted=4)), contracted=(1,), stack=(0,)
)

# What is done, and which stored axes each axis of the result is made of.
CASES = {
    "transpose": (lambda w: w.transpose(2, 0, 1), ((2,), (0,), (1,))),
    "cast": (lambda w: w.astype(jnp.bfloat16), ((0,), (1,), (2,))),
    "merge": (lambda w: lax.reshape(w, (4, 48)), ((0,), (1, 2))),
    "split": (lambda w: lax.reshape(w, (4, 2, 4, 6)), ((0,), (1,), (1,), (2,))),
    "add an axis": (lambda w: lax.reshape(w, (4, 1, 8, 6)), ((0,), (), (1,), (2,))),
    "broadcast": (
        lambda w: lax.broadcast_in_dim(w, (1, 4, 8, 6), (1, 2, 3)),
        ((), (0,), (1,), (2,)),
    ),
    "slice": (lambda w: lax.slice(w, (1, 4, 0), (3, 8, 6)), ((0,), (1,), (2,))),
    "index": (lambda w: lax.squeeze(lax.slice(w, (1, 0, 0), (2, 8, 6)), (0,)), ((1,), (2,))),
}


def _follow(function, value):
    """Evaluates `function` on a weight, view by view."""
    closed = jax.make_jaxpr(function)(ARRAY)
    (weight,) = [whole(value, "w")]
    for eqn in closed.eqns:
        weight = VIEWS[eqn.primitive.name](eqn, weight)
    return weight


@pytest.mark.parametrize("case", [c for c in CASES if c != "merge"])
def test_a_view_of_codes_is_the_view_of_what_they_stand_for(case):
    function, axes = CASES[case]
    weight = _follow(function, Q)
    assert weight.quantized and weight.axes == axes
    expected = function(jq.dequantize(Q))
    assert weight.value.dtype == expected.dtype
    np.testing.assert_array_equal(jq.dequantize(weight.value), expected)


@pytest.mark.parametrize("case", CASES)
def test_a_view_of_an_ordinary_parameter_is_the_operation_itself(case):
    function, axes = CASES[case]
    weight = _follow(function, ARRAY)
    assert weight.axes == axes
    np.testing.assert_array_equal(weight.value, function(ARRAY))


def test_a_view_that_would_break_tiles_says_so():
    with pytest.raises(ValueError, match="would break tiles"):
        _follow(CASES["merge"][0], Q)
    with pytest.raises(ValueError, match="cuts tiles of 4"):
        _follow(lambda w: lax.slice(w, (0, 2, 0), (4, 6, 6)), Q)


@pytest.mark.parametrize(
    "function",
    [
        lambda w: lax.broadcast_in_dim(w, (2, 4, 8, 6), (1, 2, 3)),
        lambda w: lax.slice(w, (0, 0, 0), (4, 8, 6), (1, 2, 1)),
        lambda w: lax.convert_element_type(w, jnp.int32),
    ],
    ids=["repeat", "stride", "integers"],
)
def test_what_changes_values_or_repeats_them_is_no_view(function):
    assert _follow(function, Q) is None


def test_a_slice_at_a_traced_position_reads_one_of_a_stack():
    eqn = jax.make_jaxpr(lambda w, i: lax.dynamic_slice(w, (i, 0, 0), (1, 8, 6)))(ARRAY, 0).eqns[-1]
    weight = VIEWS["dynamic_slice"](eqn, whole(Q, "w"), 2, 0, 0)
    np.testing.assert_array_equal(jq.dequantize(weight.value), jq.dequantize(Q)[2:3])
