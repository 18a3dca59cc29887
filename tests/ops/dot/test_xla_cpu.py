"""Activations in fixed point, and what is refused; products are in tests/laws/test_dots.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products import bound, CASES, exact, operands, product, stored_for
from quantized import normal

from jaxquant.ops import dot_general, Refusal
from jaxquant.ops.dot import _xla_cpu


def _rows() -> jax.Array:
    rows = np.asarray(normal(6, 512)).copy()
    rows[1] *= 1e-30
    rows[2] *= 1e30
    rows[3] = 0
    rows[4, :] = -1.0
    rows[5, 1:] = 0
    return jnp.asarray(rows)


@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_digits_stand_for_the_row_to_the_last_bit_of_its_peak(run):
    x = _rows()
    digits, step = run(_xla_cpu.digits_of)(x)
    assert digits.dtype == jnp.int8
    count = digits.shape[0]
    weights = 256.0 ** -np.arange(count)[:, None, None]
    back = (np.asarray(digits).astype(np.float64) * weights).sum(axis=0) * np.asarray(step)
    peak = np.abs(np.asarray(x)).max(axis=1, keepdims=True)
    # Half a step of the last digit, and the rounding of the division.
    allowed = (0.5 * 256.0 ** (1 - count) / 127 + 2.0**-23) * peak
    assert (np.abs(back - np.asarray(x)) <= allowed).all()


def test_the_top_digit_of_a_peak_does_not_overflow():
    """127 and all lower digits: the largest number that they spell is met, in both signs."""
    x = jnp.asarray([[1.0, -1.0, 0.99999994, -0.99999994]])
    digits, step = _xla_cpu.digits_of(x)
    assert np.asarray(digits)[0].tolist() == [[127, -127, 127, -127]]
    assert step[0, 0] == pytest.approx(1 / 127)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("name", ["int8 channel", "int4 zero g64"])
def test_a_row_that_is_not_finite_gives_nothing_finite(name: str, bad: float):
    case = CASES["rows"]
    x, q = operands(case, None, name)
    w = stored_for("xla_cpu", case, q)
    y = dot_general(x.at[3, 17].set(bad), w, case.numbers, backend="xla_cpu")
    finite = np.isfinite(np.asarray(y))
    assert not finite[3].any() and np.delete(finite, 3, axis=0).all()


def test_the_error_stays_that_of_float32_where_a_row_has_an_outlier():
    case = CASES["rows"]
    x, q = operands(case, None, "int8 channel")
    x = x.at[:, 5].set(1000.0)
    w = stored_for("xla_cpu", case, q)
    got = dot_general(x, w, case.numbers, backend="xla_cpu")
    moved = np.abs(np.asarray(got) - product(case, x, q))
    assert (moved <= bound(case, x, q, halves=False)).all()


def test_the_weight_may_be_differentiated_in_its_scales():
    case = CASES["rows"]
    x, q = operands(case, None, "int8 channel")
    w = stored_for("xla_cpu", case, q)

    def loss(scale):

        y = dot_general(x, dataclasses.replace(w, scale=scale), case.numbers, backend="xla_cpu")
        return y.sum()

    got = np.asarray(jax.grad(loss)(w.scale)).ravel()
    codes = exact(q) / np.asarray(q.scale)
    expected = (np.asarray(x).astype(np.float64) @ codes).sum(axis=0)
    allowed = (256 + 16) * 2.0**-24 * (np.abs(np.asarray(x)) @ np.abs(codes)).sum(axis=0)
    assert (np.abs(got - expected) <= allowed).all()


def _refusal(x, w) -> str:
    with pytest.raises(Refusal) as refusal:
        dot_general(x, w, CASES["rows"].numbers, out_dtype=jnp.float32, backend="xla_cpu")
    return str(refusal.value)


def test_what_it_is_not_made_for_is_refused():
    case = CASES["rows"]
    x, q = operands(case, None, "int8 channel")
    w = stored_for("xla_cpu", case, q)
    assert "not stored last; `jaxquant.prepare`" in _refusal(x, q)
    many = normal(_xla_cpu.MOST_DIGIT_ROWS + 1, 256)
    assert "rows of digits" in _refusal(many, w)
    half = x.astype(jnp.float16)
    assert "activations are float16" in _refusal(half, w)
    _, floats = operands(case, None, "e4m3 channel")
    assert "digits multiply integers, not E4M3" in _refusal(x, stored_for("xla_cpu", case, floats))
    _, zeros = operands(case, None, "int8 zero channel")
    assert "does not fit int8" in _refusal(x, stored_for("xla_cpu", case, zeros))
