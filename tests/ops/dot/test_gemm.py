"""A dot as kernels see it: which calls are products of rows by one matrix, and what they give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products import CASES, operands, plain
from quantized import SCHEMES

from jaxquant.ops.dot import make_call
from jaxquant.ops.dot._gemm import (
    as_gemm,
    outputs_first,
    refuses_shape,
    scale_per_output,
    weight_side,
)
from jaxquant.qarray import dequantize, Layout, quantize_array, relayout

TAKEN = ["rows", "one row", "rows of rows", "weight on the left", "weight stored by output"]
TAKEN += ["vector", "one output"]


@pytest.mark.parametrize("name", TAKEN)
def test_the_rows_times_the_matrix_finish_as_the_call(name: str):
    case = CASES[name]
    sides = operands(case, None, "int4 zero g64")
    call = make_call(*sides, case.numbers)
    assert refuses_shape(call) is None and weight_side(call) == case.weight
    gemm = as_gemm(call)
    w = dequantize(sides[case.weight], jnp.float32)
    w = w.T if gemm.outputs_first else w
    assert (gemm.rows, gemm.k, gemm.n, gemm.group) == (gemm.x.shape[0], *w.shape, 64)
    expected = jax.lax.dot_general(plain(case, 0), plain(case, 1), case.numbers)
    got = gemm.finish(gemm.x @ w)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, _by_weight(case, sides), rtol=1e-4, atol=1e-4)


def _by_weight(case, sides):
    whole = [dequantize(x, jnp.float32) if i == case.weight else x for i, x in enumerate(sides)]
    return jax.lax.dot_general(*whole, case.numbers)


def test_the_stored_order_tells_which_axis_is_first():
    case = CASES["rows"]
    x, w = operands(case, None, "int4 zero g64")
    assert not outputs_first(make_call(x, w, case.numbers))
    turned = relayout(w, Layout(order=(-1, -2)))
    assert outputs_first(make_call(x, turned, case.numbers))


def test_other_calls_are_refused_by_what_they_are():
    for name, reason in (
        ("batch", "batch axes; map over them with `vmap`"),
        ("several contracted", "this one has 3, and 2 of them are summed"),
        ("two vectors", "this one has 1, and 1 of them are summed"),
    ):
        case = CASES[name]
        said = refuses_shape(make_call(*operands(case, None, "int8 channel"), case.numbers))
        assert said is not None and reason in said
    case = CASES["rows"]
    assert refuses_shape(make_call(plain(case, 0), plain(case, 1), case.numbers)) == (
        "neither side is a QArray"
    )


@pytest.mark.parametrize("name", ["int8 channel", "int8 tensor", "e4m3 block", "int4 zero g64"])
@pytest.mark.parametrize("order", [None, (-1, -2)])
def test_scales_for_each_output(name: str, order):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(256, 384)), jnp.float32)
    q = relayout(quantize_array(w, SCHEMES[name], contracted=(0,)), Layout(order=order))
    scale = np.asarray(scale_per_output(q, outputs_first=order is not None))
    groups = 256 // q.tile[0]
    assert scale.shape == (groups, 384)
    values = np.asarray(dequantize(q)) / np.repeat(scale, 256 // groups, axis=0)
    # What is left are codes.
    if name != "e4m3 block":
        np.testing.assert_allclose(values, np.round(values), atol=1e-3)
    assert np.abs(values).max() <= 448
