"""Rules of users' `custom_jvp` and `custom_vjp` that read weights: theirs is what runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import Applied, inputs, W8A16, weight, wrapped
from transforms import K, ROWS

import jaxquant as jq


def _w():
    """Sums over both axes of it are exact: its rows and columns have a peak of -128 each."""
    return weight(K, K).at[jnp.arange(K), jnp.arange(K)].set(-128.0)


def _quantized(function, contracted=None):
    model, x = Applied(function, (K, K)), inputs(5, K)
    variables = {"params": {"w": _w()}}
    plan = jq.plan(model, variables, x, recipe=W8A16)
    return wrapped(model, plan), jq.quantize(variables, plan), x


@pytest.mark.parametrize("factor, name", [(3.0, "custom_jvp"), (5.0, "custom_vjp")])
def test_the_rule_that_runs_is_the_users(factor, name):
    (row,) = [row for row in ROWS if row.name == name]
    qmodel, qvariables, x = _quantized(row.function)
    for apply in (qmodel.apply, jax.jit(qmodel.apply)):
        got = jax.grad(lambda x: apply(qvariables, x).sum())(x)  # noqa: B023
        np.testing.assert_array_equal(got, factor * (jnp.ones_like(x) @ _w().T))


def test_integer_arguments_of_a_custom_jvp_have_no_tangent():
    @jax.custom_jvp
    def f(x, times, w):
        return times.astype(jnp.float32) * (x @ w)

    f.defjvp(lambda p, t: (f(*p), 2.0 * (t[0] @ p[2])))
    qmodel, qvariables, x = _quantized(lambda x, w: f(x, jnp.arange(5)[:, None], w))
    got = jax.grad(lambda x: qmodel.apply(qvariables, x).sum())(x)
    np.testing.assert_array_equal(got, 2.0 * (jnp.ones_like(x) @ _w().T))


def test_a_weight_that_only_the_derivative_rule_multiplies_needs_no_site():
    @jax.custom_vjp
    def f(x, w):
        return x * jnp.take(w, jnp.arange(5), axis=0)

    f.defvjp(lambda x, w: (f(x, w), w), lambda w, g: (g @ w, jnp.zeros_like(w)))
    qmodel, qvariables, x = _quantized(f)
    assert [site.site for site in qmodel.plan.sites] == ["w#take"]
    got = jax.grad(lambda x: qmodel.apply(qvariables, x).sum())(x)
    np.testing.assert_array_equal(got, jnp.ones_like(x) @ _w())


def test_a_rule_around_weights_alone_is_passed_through():
    @jax.custom_jvp
    def transposed(w):
        return w.T

    transposed.defjvp(lambda p, t: (p[0].T, 2.0 * t[0].T))
    qmodel, qvariables, x = _quantized(lambda x, w: x @ transposed(w))
    assert [site.site for site in qmodel.plan.sites] == ["w#dot"]
    np.testing.assert_array_equal(qmodel.apply(qvariables, x), x @ _w().T)


def test_symbolic_zeros_reach_the_users_rule():
    seen = []

    @jax.custom_jvp
    def f(x, w):
        return x @ w

    def rule(primals, tangents):
        seen.append([type(t).__name__ for t in tangents])
        return f(*primals), 2.0 * (tangents[0] @ primals[1])

    f.defjvp(rule, symbolic_zeros=True)
    qmodel, qvariables, x = _quantized(f)
    got = jax.grad(lambda x: qmodel.apply(qvariables, x).sum())(x)
    np.testing.assert_array_equal(got, 2.0 * (jnp.ones_like(x) @ _w().T))
    assert seen[-1][1] == "SymbolicZero"


def test_several_outputs_and_saved_weights_of_a_custom_vjp():
    @jax.custom_vjp
    def f(x, w):
        return x @ w, jnp.arange(3), x.sum()

    f.defvjp(
        lambda x, w: (f(x, w), (w, {"x": x})),
        lambda saved, g: (g[0] @ saved[0].T + 7 * g[2] * saved[1]["x"], None),
    )
    qmodel, qvariables, x = _quantized(lambda x, w: f(x, w))
    got = jax.grad(lambda x: qmodel.apply(qvariables, x)[0].sum())(x)
    np.testing.assert_array_equal(got, jnp.ones_like(x) @ _w().T)
    got = jax.grad(lambda x: qmodel.apply(qvariables, x)[2])(x)
    np.testing.assert_array_equal(got, 7 * x)


def test_second_derivatives_use_the_users_rule_twice():
    @jax.custom_jvp
    def f(x, w):
        return ((x @ w) ** 2).sum()

    f.defjvp(lambda p, t: (f(*p), (3.0 * (p[0] @ p[1]) * (t[0] @ p[1])).sum()))
    qmodel, qvariables, x = _quantized(f)
    got = jax.hessian(lambda row: qmodel.apply(qvariables, row[None]))(x[0] / 8)
    np.testing.assert_array_equal(got, 3.0 * _w() @ _w().T)
