"""Products of codes have the derivatives of the products of what the codes stand for."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.numerics import INT4, INT8
from jaxquant.ops import dot
from jaxquant.qarray import dequantize, PER_CHANNEL, quantize_array, Scheme, Tile
from jaxquant.training import straight_through

X = jax.random.normal(jax.random.key(0), (5, 32))
W = jax.random.normal(jax.random.key(1), (32, 7))
XQ = quantize_array(X, Scheme(values=INT8, tile=PER_CHANNEL), contracted=(1,))
WQ = quantize_array(W, Scheme(values=INT4, tile=Tile(contracted=16)), contracted=(0,))


def product(x, w, held):
    return straight_through(lambda held: dot(*held), lambda x, w: x @ w, (x, w), held)


def test_the_forward_is_the_product_of_codes():
    np.testing.assert_array_equal(product(X, W, (XQ, WQ)), dot(XQ, WQ))


def test_gradients_are_those_of_what_codes_stand_for():
    g = jax.random.normal(jax.random.key(2), (5, 7))
    _, pull = jax.vjp(lambda x, w: product(x, w, (XQ, WQ)), X, W)
    dx, dw = pull(g)
    for found, left, right in ((dx, g, dequantize(WQ).T), (dw, dequantize(XQ).T, g)):
        # Two orders of a float32 sum of products.
        bound = 2 * (left.shape[1] + 2) * 2.0**-24 * (abs(left) @ abs(right))
        assert (abs(found - left @ right) <= bound).all()


def test_only_codes_are_kept_for_the_way_back():
    _, pull = jax.vjp(lambda x, w: product(x, w, (XQ, WQ)), X, W)
    kept = {(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(pull)}
    assert ((5, 32), "int8") in kept and ((32, 7), "int4") in kept
    assert not {((5, 32), "float32"), ((32, 7), "float32")} & kept


def test_integers_have_no_gradient():
    table, rows = W, jnp.array([3, 1, 3])
    q = quantize_array(table, Scheme(values=INT4, tile=PER_CHANNEL), contracted=(1,))

    def look(table):
        return straight_through(
            lambda held: dequantize(held[0])[held[1]], lambda t, i: t[i], (table, rows), (q, rows)
        )

    _, pull = jax.vjp(look, table)
    (found,) = pull(jnp.ones((3, 7)))
    np.testing.assert_array_equal(found, jnp.zeros((32, 7)).at[rows].add(1.0))
