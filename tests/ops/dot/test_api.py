"""What the dot accepts and how it answers; what it computes is in tests/laws/test_dots.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantized import normal, SCHEMES

from jaxquant.ops import BACKENDS, choose_backend, dot, dot_general, Refusal
from jaxquant.ops.dot import layout_for
from jaxquant.ops.dot._api import make_call
from jaxquant.qarray import check_qarray, Layout, quantize_array, relayout

X, W = normal(8, 64), normal(64, 16)
Q = quantize_array(W, SCHEMES["int8 channel"], contracted=(0,))
ROWS = (((1,), (0,)), ((), ()))


def test_the_reference_comes_last_and_takes_every_call():
    assert list(BACKENDS)[-1] == "reference"
    mixed = quantize_array(X, SCHEMES["e4m3 channel"])
    for lhs in (X, mixed):
        assert dot_general(lhs, Q, ROWS, backend="reference").shape == (8, 16)


def test_an_unknown_backend_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="no backend named 'cuda'. It has: .*xla, reference"):
        dot_general(X, Q, ROWS, backend="cuda")


def test_a_named_backend_that_cannot_says_why():
    mixed = quantize_array(X, SCHEMES["e4m3 channel"])
    with pytest.raises(Refusal, match="'xla' of dot refuses: .*not E4M3 with INT8"):
        dot_general(mixed, Q, ROWS, backend="xla")


def test_nothing_falls_back_in_silence():
    call = make_call(X, Q, ROWS)
    name, reasons = choose_backend(call)
    assert set(reasons) == set(list(BACKENDS)[: list(BACKENDS).index(name)])
    assert all(reasons.values())
    assert choose_backend(call, "reference") == ("reference", {})


def test_lengths_that_differ_are_named():
    with pytest.raises(ValueError, match="Axis 1 of the left side has 64 .*axis 1 of the right "):
        dot_general(X, Q, (((1,), (1,)), ((), ())))
    with pytest.raises(ValueError, match=r"Shapes: \(8, 64\) and \(64, 16\)"):
        dot_general(X, Q, (((1,), (0,)), ((0,), (1,))))


def test_a_broken_qarray_is_refused_before_it_is_used():
    broken = dataclasses.replace(Q, scale=jnp.ones((3, 16)))
    with pytest.raises(ValueError, match="cannot tile"):
        dot(X, broken)
    with pytest.raises(TypeError, match="are stored as int8, but these are float32"):
        dot(X, dataclasses.replace(Q, codes=Q.codes.astype(jnp.float32)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_result_has_the_wider_dtype_or_the_one_that_is_asked_for(backend: str):
    q = relayout(Q, layout_for(backend, Q, (0,), ()))
    assert dot_general(X, q, ROWS, backend=backend).dtype == jnp.float32
    half = dot_general(X, q, ROWS, out_dtype=jnp.bfloat16, backend=backend)
    assert half.dtype == jnp.bfloat16


def test_dot_sums_the_last_axis_by_the_first():
    x = normal(2, 3, 64)
    expected = jnp.tensordot(x, dot(jnp.eye(64), Q), 1)
    np.testing.assert_allclose(dot(x, Q), expected, rtol=1e-4, atol=1e-4)
    assert dot(x, Q, backend="reference").shape == (2, 3, 16)


@pytest.mark.parametrize("name", ["int8 channel", "int4 zero g64", "e4m3 channel"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_names_the_layout_that_it_reads(backend: str, name: str):
    w = normal(3, 64, 4, 16)
    q = quantize_array(w, SCHEMES[name], contracted=(1,), stack=(0,))
    layout = layout_for(backend, q, (1,), (0,))
    assert isinstance(layout, Layout)
    moved = relayout(q, layout)
    check_qarray(moved)
    # It is still a stack of weights: one comes off the front.
    check_qarray(jax.tree.map(lambda leaf: leaf[0], moved))
    assert jax.tree.map(lambda leaf: leaf[0], moved).shape == (64, 4, 16)


def test_a_layout_that_a_backend_cannot_read_is_refused_with_a_way_out():
    with pytest.raises(Refusal, match="not stored last; `jaxquant.prepare` puts them there"):
        dot_general(X, Q, ROWS, backend="xla_cpu")
