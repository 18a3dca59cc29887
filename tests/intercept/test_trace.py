"""From a function of variables to its evaluation: what is traced, and what comes back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import Applied, inputs, W8, W8A16, weight, wrapped

import jaxquant as jq
from jaxquant.intercept._trace import is_array

K = 8
X = inputs(4, K)


def _quantized(function, *args, recipe=W8A16):
    model, variables = Applied(function, (K, K)), {"params": {"w": weight(K, K)}}
    plan = jq.plan(model, variables, *args, recipe=recipe)
    return wrapped(model, plan), jq.quantize(variables, plan)


@pytest.mark.parametrize("x", [1, 2.0, True, None, "text", print, (1, 2)], ids=repr)
def test_what_is_no_array_is_not_traced(x):
    assert not is_array(x)


@pytest.mark.parametrize("x", [np.float32(1), np.ones(2), jnp.ones(2)], ids=type)
def test_arrays_are_traced(x):
    assert is_array(x)


def test_outputs_keep_their_structure_and_what_is_no_array():
    function = lambda x, w: {"y": [x @ w, None], "n": 3, "s": "s", "f": print}  # noqa: E731
    qmodel, qvariables = _quantized(function, X)
    got = qmodel.apply(qvariables, X)
    assert (got["n"], got["s"], got["f"], got["y"][1]) == (3, "s", print, None)
    np.testing.assert_array_equal(got["y"][0], X @ weight(K, K))


def test_numpy_arguments_and_arguments_unused():
    qmodel, qvariables = _quantized(lambda a, w: a["x"] @ w, {"x": X, "unused": X})
    got = qmodel.apply(qvariables, {"x": np.asarray(X), "unused": np.asarray(X)})
    np.testing.assert_array_equal(got, X @ weight(K, K))


def test_weak_types_of_arguments_are_kept():
    function = lambda a, w: (a[0] @ w) * a[1]  # noqa: E731
    scale = jnp.float32(2.0)
    weak = jax.jit(lambda s: s)(2.0)
    assert weak.weak_type and not scale.weak_type
    half = X.astype(jnp.bfloat16)
    model = Applied(lambda a, w: (a[0] @ w.astype(jnp.bfloat16)) * a[1], (K, K))
    variables = {"params": {"w": weight(K, K)}}
    plan = jq.plan(model, variables, (half, weak), recipe=W8A16)
    got = wrapped(model, plan).apply(jq.quantize(variables, plan), (half, weak))
    assert got.dtype == jnp.bfloat16
    qmodel, qvariables = _quantized(function, (X, scale))
    assert not qmodel.apply(qvariables, (X, scale)).weak_type


def test_qarrays_among_the_arguments_are_left_to_the_model():
    q = jq.quantize_array(weight(K, K), W8)
    function = lambda a, w: a[0] @ w + jq.dequantize(a[1])[:4]  # noqa: E731
    model, variables = Applied(function, (K, K)), {"params": {"w": weight(K, K)}}
    plan = jq.plan(model, variables, (X, q), recipe=W8A16)
    got = wrapped(model, plan).apply(jq.quantize(variables, plan), (X, q))
    np.testing.assert_array_equal(got, X @ weight(K, K) + jq.dequantize(q)[:4])


def test_a_weight_in_the_output_is_dequantized_if_the_rule_says_so():
    rule = jq.Rule(match="w", weights=W8, elsewhere="dequantize")
    recipe = jq.Recipe(name="r", rules=(rule,))
    qmodel, qvariables = _quantized(lambda x, w: (x @ w, w, w.T), X, recipe=recipe)
    _, same, turned = jax.jit(qmodel.apply)(qvariables, X)
    np.testing.assert_array_equal(same, weight(K, K))
    np.testing.assert_array_equal(turned, weight(K, K).T)


def test_random_keys_are_arguments_like_any_other():
    def function(arguments, w):
        x, key = arguments
        return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0.0) @ w

    key = jax.random.key(1)
    qmodel, qvariables = _quantized(function, (X, jax.random.key(0)))
    want = function((X, key), weight(K, K))
    np.testing.assert_array_equal(jax.jit(qmodel.apply)(qvariables, (X, key)), want)


def test_differing_structures_of_arguments_trace_apart_and_the_same_once():
    count = []

    def function(x, w):
        count.append(1)
        return jax.tree.leaves(x)[0] @ w

    qmodel, qvariables = _quantized(function, X)
    step = jax.jit(qmodel.apply)
    count.clear()
    for argument in (X, X + 1, [X], [X + 2], X):
        step(qvariables, argument)
    assert len(count) == 2
