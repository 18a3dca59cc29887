"""Loops that carry weights: what every step hands on stays codes, what changes is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import Applied, inputs, W8, W8A16, weight, wrapped
from jax import lax

import jaxquant as jq

K = 8
X = inputs(4, K)


def layer(x, w):
    return jnp.clip(x @ w, -4, 4)


def through_remat(x, w):
    body = jax.checkpoint(lambda x, w: (layer(x, w), w))
    return lax.scan(lambda carry, _: (body(*carry), None), (x, w), None, length=2)[0][0]


def through_jit(x, w):
    body = jax.jit(lambda x, w: (layer(x, w), w))
    return lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, *body(s[1], s[2])), (0, x, w))[1]


def beside_one_that_changes(x, w):
    def body(carry, _):
        x, w, total = carry
        return (layer(x, w), w, total + x.sum()), None

    return lax.scan(body, (x, w, jnp.zeros(())), None, length=2)[0][0]


@pytest.mark.parametrize("function", [through_remat, through_jit, beside_one_that_changes])
def test_weights_handed_on_stay_codes(function):
    model, variables = Applied(function, (K, K)), {"params": {"w": weight(K, K)}}
    plan = jq.plan(model, variables, X, recipe=W8A16)
    assert [s.site for s in plan.sites] == ["w#dot"]
    qvariables = jq.quantize(variables, plan)
    want = layer(layer(X, weight(K, K)), weight(K, K))
    np.testing.assert_array_equal(jax.jit(wrapped(model, plan).apply)(qvariables, X), want)
    stats = jq.observe(model, variables, [(X,)])
    assert float(stats["w#dot"]["moments"]["rows"]) == 2 * len(X)


def updated_in_the_loop(x, w):
    return lax.fori_loop(0, 2, lambda _, s: (layer(*s), s[1] + 1), (x, w))[0]


def transposed(x, w):
    return lax.fori_loop(0, 2, lambda _, s: (layer(*s), s[1].T), (x, w))[0]


def exchanged(x, w):
    a, b = jnp.split(w, 2, axis=1)

    def body(_, state):
        x, a, b = state
        return layer(layer(x, a), b.T), b, a

    return lax.fori_loop(0, 2, body, (x, a, b))[0]


@pytest.mark.parametrize("function", [updated_in_the_loop, transposed, exchanged])
def test_weights_that_a_loop_changes_are_refused_or_dequantized(function):
    variables = {"params": {"w": weight(K, K)}}
    # One more use, outside, makes it a weight that a rule can quantize.
    both = Applied(lambda x, w: function(x, w) + layer(x, w), (K, K))
    with pytest.raises(jq.PlanError, match="carries it and changes it on the way"):
        jq.plan(both, variables, X, recipe=W8A16)
    rule = jq.Rule(match="w", weights=W8, elsewhere="dequantize")
    plan = jq.plan(both, variables, X, recipe=jq.Recipe(name="r", rules=(rule,)))
    qvariables = jq.quantize(variables, plan)
    got = jax.jit(wrapped(both, plan).apply)(qvariables, X)
    np.testing.assert_array_equal(got, both.apply(variables, X))


def test_scanned_slices_that_are_handed_out_again_are_the_stack():
    rule = jq.Rule(match="w", weights=W8, elsewhere="error")

    def function(x, w):
        x, same = lax.scan(lambda x, w: (layer(x, w), w), x, w)
        return lax.scan(lambda x, w: (layer(x, w), None), x, same)[0]

    model, variables = Applied(function, (3, K, K)), {"params": {"w": weight(3, K, K)}}
    plan = jq.plan(model, variables, X, recipe=jq.Recipe(name="r", rules=(rule,)))
    assert [s.site for s in plan.sites] == ["w#dot", "w#dot.1"]
    got = jax.jit(wrapped(model, plan).apply)(jq.quantize(variables, plan), X)
    np.testing.assert_array_equal(got, model.apply(variables, X))


def test_a_reversed_scan_takes_the_last_slice_first():
    def function(x, w):
        return lax.scan(lambda x, w: (layer(x, w), x), x, w, reverse=True)

    model, variables = Applied(function, (3, K, K)), {"params": {"w": weight(3, K, K)}}
    plan = jq.plan(model, variables, X, recipe=W8A16)
    got = jax.jit(wrapped(model, plan).apply)(jq.quantize(variables, plan), X)
    jax.tree.map(np.testing.assert_array_equal, got, model.apply(variables, X))
    stats = jq.observe(model, variables, [(X,)])["w#dot"]
    np.testing.assert_array_equal(stats["peak"][2], jnp.abs(X).max(0))
