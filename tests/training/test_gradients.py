"""Gradients are rounded at random: right on average, and the same bits for the same step."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.numerics import INT8
from jaxquant.qarray import PER_CHANNEL, Scheme
from jaxquant.training import rounded_gradient

SCHEME = Scheme(values=INT8, tile=PER_CHANNEL)


def rounds(g, seed=0):
    return rounded_gradient(g, SCHEME, contracted=(1,), seed=seed)


def test_the_expectation_stays():
    g = jax.random.normal(jax.random.key(0), (4, 256))
    many = jnp.stack([jax.jit(rounds, static_argnums=1)(g, seed) for seed in range(64)])
    gap = jnp.abs(g).max(1, keepdims=True) / 127
    # A mean of 64 of variance at most gap^2 / 4: six standard errors.
    assert (abs(many.mean(0) - g) <= 6 * gap / 2 / 64**0.5).all()
    nearest = jnp.round(g / gap) * gap
    assert (abs(nearest - g) > 6 * gap / 2 / 64**0.5).any()


def test_values_are_those_of_neighbouring_codes():
    g = jax.random.normal(jax.random.key(0), (4, 256))
    gap = jnp.abs(g).max(1, keepdims=True) / 127
    codes = np.asarray(rounds(g) / gap)
    np.testing.assert_allclose(codes, codes.round(), atol=1e-4)
    assert (abs(rounds(g) - g) <= gap * (1 + 1e-5)).all()


def test_dice_follow_the_step_and_the_site():
    g = jax.random.normal(jax.random.key(0), (4, 256))
    np.testing.assert_array_equal(rounds(g), rounds(g))
    np.testing.assert_array_equal(rounds(g), jax.jit(rounds)(g))
    assert (rounds(g) != rounds(g, 1)).any()
    moved = g.at[0, 0].add(1e-3)
    assert (rounds(g)[1:] != rounds(moved)[1:]).any()
