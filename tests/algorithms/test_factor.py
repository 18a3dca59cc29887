"""Damped Cholesky factors."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.algorithms._factor import ATTEMPTS, damped_factor


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
