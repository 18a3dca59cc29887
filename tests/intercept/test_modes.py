"""What the modes do at a site."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import Applied, inputs, W8, W8A8, W8A16, weight

import jaxquant as jq
from jaxquant.intercept._evaluate import Mode
from jaxquant.intercept._modes import Infer, ListSites, Observe

K = 8
X = inputs(4, K)


def _setting(function=jnp.matmul, shape=(K, K), recipe=W8A16, x=X):
    model, variables = Applied(function, shape), {"params": {"w": weight(*shape)}}
    plan = jq.plan(model, variables, x, recipe=recipe)
    return model, variables, plan, jq.quantize(variables, plan)


def test_every_mode_answers_all_questions():
    _, _, plan, _ = _setting()
    for mode in (ListSites(), Infer(plan), Observe([])):
        assert isinstance(mode, Mode) and isinstance(mode.for_derivatives(), Mode)


def test_infer_is_what_the_quantized_dot_is():
    for recipe in (W8A16, W8A8):
        model, _, plan, qvariables = _setting(recipe=recipe)
        q, x = qvariables["params"]["w"], X / 3
        want = jq.dot(
            x if recipe is W8A16 else jq.quantize_activation(x, W8, contracted=(1,)),
            q,
            backend="reference",
        )
        got = jq.wrap(model, plan, backend="reference").apply(qvariables, x)
        np.testing.assert_array_equal(got, want)


def test_an_unknown_backend_is_an_error():
    model, _, plan, qvariables = _setting()
    with pytest.raises(ValueError, match="no backend named 'fast'"):
        jq.wrap(model, plan, backend="fast").apply(qvariables, X)


def test_a_site_that_only_this_call_reaches_does_as_its_siblings_do():
    def function(x, w):
        y = x[0] @ w
        return y @ w if isinstance(x, list) else y

    model, _, plan, qvariables = _setting(function, x=(X,))
    np.testing.assert_array_equal(
        jq.wrap(model, plan, backend="xla").apply(qvariables, [X]), X @ weight(K, K) @ weight(K, K)
    )


def test_a_site_whose_siblings_disagree_is_an_error():
    def function(x, w):
        y = x[0] @ w, (x[0] + 1) @ w
        return (*y, (x[0] + 2) @ w) if isinstance(x, list) else y

    rules = (jq.Rule(match="w#dot.1", weights=W8), *W8A8.rules)
    model, _, plan, qvariables = _setting(function, recipe=jq.Recipe(name="r", rules=rules), x=(X,))
    with pytest.raises(jq.PlanError, match="uses w#dot.2, which is not in the plan"):
        jq.wrap(model, plan).apply(qvariables, [X])


@pytest.mark.parametrize(
    "subscripts, x_shape, w_shape, order",
    [
        ("nhk,hkd->nd", (4, 2, 3), (2, 3, 5), "nhk"),
        ("nkh,hkd->nd", (4, 3, 2), (2, 3, 5), "nhk"),
        ("dhk,nhk->dn", (4, 2, 3), (5, 2, 3), "nhk"),
        ("bnk,bkd->bnd", (2, 4, 3), (2, 3, 5), "bnk"),
    ],
)
def test_what_is_observed_is_laid_out_as_the_weight_is_stored(subscripts, x_shape, w_shape, order):
    x, w = inputs(*x_shape), jnp.ones(w_shape)
    model = Applied(lambda x, w: jnp.einsum(subscripts, x, w), w_shape)
    stats = jq.observe(
        model, {"params": {"w": w}}, [(x,)], observers=(jq.observers.Peak(), jq.observers.Gram())
    )
    left = subscripts.split(",")[0].replace("d", "n")
    rows = jnp.einsum(f"{left}->{order}", x)
    flat = rows if order == "bnk" else rows.reshape(4, -1)
    np.testing.assert_array_equal(stats["w#dot"]["peak"], jnp.abs(flat).max(-2))
    np.testing.assert_array_equal(
        stats["w#dot"]["gram"], jnp.einsum("...nk,...nl->...kl", flat, flat)
    )


def test_observing_changes_nothing_that_is_computed():
    model, variables, _, _ = _setting()
    stats = jq.observe(model, variables, [(X,), (X + 1,)])
    assert set(stats) == {"w#dot"}
    assert jax.tree.leaves(stats)


def test_products_of_two_weights_have_two_sites():
    def function(x, w):
        return x @ (w[0] @ w[1])

    with pytest.raises(jq.PlanError) as error:
        _setting(function, (2, K, K))
    assert "w#dot.1 would hold w" in str(error.value)
