"""Gradients with respect to inputs, through every way in which JAX hands a weight to a body."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import Applied, dequantized, inputs, W8A8, W8A16, weight, wrapped
from transforms import K, ROWS

import jaxquant as jq


def _loss(model, shift):
    """A whole-numbered loss that gives each output its own gradient."""

    def loss(variables, x):
        y = jax.tree.leaves(model.apply(variables, x))[0]
        return (y * (shift + jnp.arange(y.size, dtype=y.dtype).reshape(y.shape) % 3)).sum()

    return loss


def _setting(row, recipe=W8A16):
    model = Applied(row.function, row.shape)
    # With every entry small, hardly a sum is clipped and gradients differ from 0.
    w = weight(*row.shape) / 1024
    variables, x = {"params": {"w": w}}, inputs(5, K)
    plan = jq.plan(model, variables, x, recipe=recipe)
    return model, wrapped(model, plan), jq.quantize(variables, plan), x


def _assert_close(got, want):
    # At most four layers, each of which rounds K products and sums once, forward and backward.
    tolerance = 2 * 4 * (K + 1) * np.finfo(np.float32).eps * max(1.0, float(jnp.abs(want).max()))
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("row", [row for row in ROWS if row.forward], ids=str)
def test_forward_derivatives_equal_those_of_the_plain_model(row):
    model, qmodel, qvariables, x = _setting(row)
    plain = dequantized(qvariables)
    tangent = inputs(*x.shape, seed=3)
    _, want = jax.jvp(lambda x: _loss(model, 1)(plain, x), (x,), (tangent,))
    _, got = jax.jit(lambda q, x: jax.jvp(lambda x: _loss(qmodel, 1)(q, x), (x,), (tangent,)))(
        qvariables, x
    )
    assert float(want) != 0
    _assert_close(got, want)


@pytest.mark.parametrize("row", [row for row in ROWS if row.reverse], ids=str)
def test_gradients_equal_those_of_the_plain_model(row):
    model, qmodel, qvariables, x = _setting(row)
    want = jax.grad(_loss(model, 1), argnums=1)(dequantized(qvariables), x)
    got = jax.jit(jax.grad(_loss(qmodel, 1), argnums=1))(qvariables, x)
    assert jnp.abs(want).max() > 0
    _assert_close(got, want)


@pytest.mark.parametrize("row", [row for row in ROWS if row.reverse], ids=str)
def test_differentiating_rounded_activations_is_an_error_naming_simulate(row):
    _, qmodel, qvariables, x = _setting(row, W8A8)
    with pytest.raises(TypeError, match="mode simulate"):
        jax.grad(lambda x: _loss(qmodel, 1)(qvariables, x))(x)


def test_gradients_that_do_not_pass_a_rounded_site_are_allowed():
    model = Applied(lambda x, w: (x[0] @ w) * x[1], (K, K))
    variables, x = {"params": {"w": weight(K, K)}}, (inputs(5, K), inputs(5, K, seed=2))
    plan = jq.plan(model, variables, x, recipe=W8A8)
    qvariables, qmodel = jq.quantize(variables, plan), wrapped(model, plan)
    got = jax.grad(lambda scale: qmodel.apply(qvariables, (x[0], scale)).sum())(x[1])
    np.testing.assert_array_equal(got, qmodel.apply(qvariables, (x[0], jnp.ones((5, K)))))
