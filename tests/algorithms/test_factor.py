"""Damped Cholesky factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.algorithms._factor import ATTEMPTS, damped_factor, made_up


def test_the_factor_is_that_of_the_damped_matrix():
    x = np.random.default_rng(0).standard_normal((40, 12)).astype(np.float32)
    gram = jnp.asarray(x.T @ x)
    mean = jnp.diagonal(gram).mean()
    factor, used = damped_factor(gram, mean, 0.25)
    assert float(used) == 0.25
    assert bool((jnp.triu(factor, 1) == 0).all())
    wanted = gram + 0.25 * mean * jnp.eye(12)
    # Twelve products of float32 numbers as large as the diagonal's root.
    np.testing.assert_allclose(factor @ factor.T, wanted, atol=12 * 6e-8 * float(wanted.max()))


@pytest.mark.parametrize(("least", "used"), [(-0.005, 0.01), (-0.05, 0.1), (-0.5, 1.0)])
def test_each_attempt_has_ten_times_the_damping(least, used):
    values = np.ones(8, np.float32)
    values[3] = least
    _, found = damped_factor(jnp.diag(jnp.asarray(values)), jnp.float32(1.0), 0.01)
    assert float(found) == pytest.approx(used)


@pytest.mark.parametrize("bad", [-1e6, np.nan, np.inf])
def test_what_nothing_helps_is_the_identity(bad):
    gram = jnp.eye(4).at[2, 2].set(bad)
    factor, used = damped_factor(gram, jnp.float32(1.0), 0.01)
    np.testing.assert_array_equal(factor, np.eye(4))
    assert float(used) == np.inf and ATTEMPTS == 4


def test_damping_of_nothing_grows_from_a_millionth():
    x = np.ones((1, 6), np.float32)
    factor, used = damped_factor(jnp.asarray(x.T @ x), jnp.float32(1.0), 0.0)
    assert 0 <= float(used) <= 1e-3 and bool(jnp.isfinite(factor).all())


def test_what_is_made_up_for_gives_the_outputs_of_float_inputs():
    rng = np.random.default_rng(5)
    y = rng.standard_normal((400, 12))
    x = y + 0.2 * y @ rng.standard_normal((12, 12)) + 0.1 * rng.standard_normal((400, 12))
    w = rng.standard_normal((7, 12))
    parts = [jnp.asarray(a, jnp.float32) for a in (w, x.T @ x, (y - x).T @ x)]
    found, solved = made_up(*parts, 0.0)
    got = np.asarray(found, np.float64)
    assert bool(solved)
    # The least squares answer: what `x` can say of `y w^T`.
    wanted = np.linalg.lstsq(x, y @ w.T, rcond=None)[0].T
    np.testing.assert_allclose(w + got, wanted, rtol=2e-3, atol=2e-3)
    before = np.linalg.norm(x @ w.T - y @ w.T)
    assert np.linalg.norm(x @ (w + got).T - y @ w.T) < 0.6 * before


def test_nothing_is_made_up_for_where_inputs_are_the_same_or_say_nothing():
    w = jnp.ones((3, 4))
    for gram, solvable in ((jnp.eye(4), True), (-jnp.eye(4), False)):
        drift = jnp.zeros((4, 4)) if solvable else jnp.ones((4, 4))
        found, solved = made_up(w, gram, drift, 0.1)
        assert not np.asarray(found).any() and bool(solved) is solvable


def test_corrections_are_in_float32_under_x64():
    w, gram = jnp.ones((2, 3), jnp.float32), jnp.eye(3, dtype=jnp.float32)
    with jax.enable_x64(True):
        assert made_up(w, gram, gram, 0.1)[0].dtype == jnp.float32
