"""What moves with the arguments: read off a jaxpr, through every kind of body."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxquant.intercept._dependence import dependence, NOTHING

X, W = jnp.ones((4, 4)), jnp.ones((4, 4))


def found(function, *moving):
    """Joins of what does not move, and products of what does, as counts."""
    closed = jax.make_jaxpr(function)(*(X for _ in moving))
    got = dependence(closed, moving)
    return len(got.joins), len(got.products)


def cat(a, b):
    return jnp.concatenate([a, b])


BODIES = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "scan constant": lambda f: lambda *a: lax.scan(lambda c, _: (c, f(*a)), 0, None, length=2)[1],
    "scan input": lambda f: (
        lambda *a: lax.scan(lambda c, xs: (c, f(*xs)), 0, tuple(jnp.stack([x, x]) for x in a))[1]
    ),
    "while": lambda f: (
        lambda *a: lax.while_loop(
            lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] + f(*a).sum()), (0, 0.0)
        )
    ),
    "cond": lambda f: lambda *a: lax.cond(jnp.array(True), f, f, *a),
}


@pytest.mark.parametrize("body", BODIES)
def test_joins_and_products_are_found_inside_of_bodies(body):
    wrap, times = BODIES[body], 2 if body == "cond" else 1
    joins = times + (2 if body == "scan input" else 0)
    assert found(wrap(cat), False, False) == (joins, 0)
    assert found(wrap(jnp.matmul), True, True)[1] == times
    assert found(wrap(jnp.matmul), True, False)[1] == 0
    moved = (1 if body == "scan input" else 0, 0)
    assert found(wrap(cat), True, False) == moved


def test_a_carry_that_moves_on_the_second_step_moves():
    def function(x, w):
        def step(carry, _):
            a, b = carry
            return (b, x), a @ a

        return lax.scan(step, (w, w), None, length=3)[1]

    assert found(function, True, False) == (0, 1)
    assert found(function, False, False) == (0, 0)


def test_a_while_condition_is_walked_with_what_the_body_makes():
    def function(x, w):
        return lax.while_loop(lambda w: (w @ w).sum() < 0, lambda w: w + x, w)

    assert found(function, True, False) == (0, 1)


def test_a_branch_taken_by_an_argument_moves():
    def function(x, w):
        y = lax.cond(x.sum() > 0, lambda: w, lambda: -w)
        return y @ y, cat(y, w)

    assert found(function, True, False) == (0, 1)


def test_whole_numbers_are_no_product():
    closed = jax.make_jaxpr(lambda x: x.astype(jnp.int32) @ x.astype(jnp.int32))(X)
    assert dependence(closed, [True]).products == frozenset()


def test_the_bodies_around_a_product_are_named():
    closed = jax.make_jaxpr(lambda x: jax.jit(lambda x: jax.checkpoint(jnp.matmul)(x, x))(x + 1))(X)
    got = dependence(closed, [True])
    assert got.products == {(1, 0, 0)} and got.around == {(1,), (1, 0)}


def test_a_call_without_either_has_nothing_to_say():
    assert dependence(jax.make_jaxpr(jnp.sin)(X), [True]) is NOTHING
