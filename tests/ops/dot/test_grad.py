"""A kernel is differentiated as the product that it computes, whatever is traced around it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products import CASES, exact, operands
from quantized import normal

from jaxquant.ops.dot._grad import product
from jaxquant.qarray import dequantize, Layout, QArray, relayout

CASE = CASES["rows"]


def _kernel(x: jax.Array, w: QArray) -> jax.Array:
    """Stands for one: the value is right, and JAX's own derivative of it would be zero."""
    return jax.lax.stop_gradient(x @ dequantize(w, x.dtype))


def _sides(name: str) -> tuple[jax.Array, QArray]:
    x, w = operands(CASE, None, name)
    return x, w


def _close(got, expected, magnitude):
    """Sums of up to 256 products in float32, twice."""
    assert (np.abs(np.asarray(got) - expected) <= 2 * (256 + 8) * 2.0**-24 * magnitude).all()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["int4 zero g64", "e4m3 channel", "nf4", "int3 g32"])
def test_the_gradient_in_x_is_the_product_with_the_weight(name: str, packed: bool):
    x, w = _sides(name)
    stored = (
        relayout(w, Layout(order=(-1, -2), packed=32)) if packed and name != "e4m3 channel" else w
    )
    out = normal(8, 24, seed=5)
    loss = jax.jit(lambda x, w: (product(_kernel, x, w, summed=0) * out).sum())
    got = jax.grad(loss)(x, stored)
    w64, o64 = exact(w), np.asarray(out).astype(np.float64)
    _close(got, o64 @ w64.T, np.abs(o64) @ np.abs(w64).T)


def test_the_gradient_in_the_scales():
    x, w = _sides("int8 channel")

    def loss(scale):
        return product(_kernel, x, dataclasses.replace(w, scale=scale), summed=0).sum()

    codes = exact(w) / np.asarray(w.scale)
    x64 = np.asarray(x).astype(np.float64)
    got = np.asarray(jax.grad(loss)(w.scale)).ravel()
    _close(got, (x64 @ codes).sum(0), (np.abs(x64) @ np.abs(codes)).sum(0))


def test_it_is_mapped_and_scanned():
    x, w = _sides("int4 zero g64")
    xs = jnp.stack([x, 2 * x])
    each = jax.vmap(lambda x: product(_kernel, x, w, summed=0))(xs)
    _, scanned = jax.lax.scan(lambda c, x: (c, product(_kernel, x, w, summed=0)), 0, xs)
    one = np.asarray(x).astype(np.float64) @ exact(w)
    size = np.abs(np.asarray(x)).astype(np.float64) @ np.abs(exact(w))
    for got in (each, scanned):
        _close(got, np.stack([one, 2 * one]), np.stack([size, 2 * size]))
    many = jax.grad(lambda xs: jax.vmap(lambda x: product(_kernel, x, w, summed=0))(xs).sum())(xs)
    w64 = exact(w)
    _close(many, np.broadcast_to(w64.sum(1), xs.shape), np.abs(w64).sum(1))
