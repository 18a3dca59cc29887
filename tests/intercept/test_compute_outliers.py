"""Sites that keep outliers apart, in models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import Applied
from flax import linen as nn
from linen_models import CASES
from states import quantized

import jaxquant as jq
from jaxquant.ops import dot_with_outliers, Outliers, OutlierWeights

INT8 = jq.Scheme(values=jq.INT8, tile=jq.PER_CHANNEL)
K = 32


def _recipe(**outliers):
    rule = jq.Rule(match="*", weights=INT8, activations=INT8, outliers=Outliers(**outliers))
    return jq.Recipe(name="llm.int8", rules=(rule,))


def _normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def _inputs(rows=6):
    return _normal(rows, K, seed=1).at[0, 3].set(40.0)


@pytest.mark.parametrize("columns", [None, 4])
def test_a_site_is_the_op(columns):
    model, variables, x = Applied(jnp.matmul, (K, 8)), {"params": {"w": _normal(K, 8)}}, _inputs()
    plan = jq.plan(model, variables, x, recipe=_recipe(columns=columns))
    tree = jq.quantize(variables, plan)
    got = jax.jit(jq.wrap(model, plan).apply)(tree, x)
    want = dot_with_outliers(
        x,
        tree["params"]["w"],
        (((1,), (0,)), ((), ())),
        activations=INT8,
        outliers=Outliers(columns=columns),
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_outliers_spoil_less_than_where_they_are_rounded_too():
    model, variables, x = Applied(jnp.matmul, (K, 8)), {"params": {"w": _normal(K, 8)}}, _inputs()
    errors = []
    for recipe in (_recipe(threshold=float("inf")), _recipe()):
        plan = jq.plan(model, variables, x, recipe=recipe)
        tree = jq.quantize(variables, plan)
        exact = x @ jq.dequantize(tree["params"]["w"])
        errors.append(float(jnp.square(jq.wrap(model, plan).apply(tree, x) - exact)[0].mean()))
    # The row's scale is 6 / 40 of what it was at most, and its error the square of that.
    assert errors[1] < errors[0] / 25


@pytest.mark.parametrize("case", CASES, ids=str)
def test_at_a_threshold_of_0_models_compute_on_what_weights_stand_for(case):
    variables = case.model.init(jax.random.key(0), *case.args)
    leave = tuple(jq.Rule(match=name, optional=True) for name in (*case.left, "*embed*"))
    options = case.options()
    rules = [(*leave, _recipe(threshold=0.0).rules[0]), (*leave, jq.Rule(match="*", weights=INT8))]
    outs = []
    for rule in rules:
        recipe = jq.Recipe(name="r", rules=rule)
        plan = jq.plan(case.model, variables, *case.args, recipe=recipe, **options)
        tree = jq.quantize(variables, plan)
        apply = jq.wrap(case.model, plan, backend="reference").apply
        outs.append(apply(tree, *case.args, **case.options()))
    tolerance = 2e-5 if case.dtype == jnp.float32 else 3e-2

    def close(a, b):
        if hasattr(a, "dtype") and jnp.issubdtype(a.dtype, jnp.floating):
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)

    jax.tree.map(close, *outs)


def test_known_columns_meet_their_original_weights_in_every_layer():
    def scanned(x, w):
        return jax.lax.scan(lambda x, w: (x, x @ w), x, w)[1]

    w, x = _normal(2, K, 8), _inputs()
    model, variables = Applied(scanned, w.shape), {"params": {"w": w}}
    plan = jq.plan(model, variables, x, recipe=_recipe(weights=OutlierWeights.ORIGINAL))
    with pytest.raises(ValueError, match="needs data at 1 sites, w#dot the first"):
        jq.quantize(variables, plan)
    columns = jnp.asarray([[3, K], [3, 5]])
    known = jnp.stack([jnp.concatenate([w[0], w[0, :1]])[columns[0]], w[1][columns[1]]])
    states = {"w#dot": {"outlier_columns": columns, "outlier_weights": known}}
    tree = quantized(variables, plan, states)
    got = jax.jit(jq.wrap(model, plan).apply)(tree, x)
    for i in range(2):
        want = dot_with_outliers(
            x,
            tree["params"]["w"][i],
            (((1,), (0,)), ((), ())),
            activations=INT8,
            outliers=Outliers(),
            columns=columns[i],
            originals=known[i],
        )
        np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-4)


def test_smoothing_comes_before_the_threshold():
    model, variables, x = Applied(jnp.matmul, (K, 8)), {"params": {"w": _normal(K, 8)}}, _inputs()
    plan = jq.plan(model, variables, x, recipe=_recipe())
    s = jnp.ones(K).at[3].set(16.0)
    got = jq.wrap(model, plan).apply(quantized(variables, plan, {"w#dot": {"smoothing": s}}), x)
    # 40 / 16 is no outlier any more: all columns are rounded.
    every = jq.plan(model, variables, x / s[None], recipe=_recipe(threshold=float("inf")))
    want = jq.wrap(model, every).apply(jq.quantize(variables, every), x / s[None])
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-5)


def test_embeddings_are_looked_up_as_ever():
    model, ids = nn.Embed(5, K), jnp.array([0, 4])
    variables = model.init(jax.random.key(0), ids)
    plan = jq.plan(model, variables, ids, recipe=_recipe())
    tree = jq.quantize(variables, plan)
    rows = jq.dequantize(tree["params"]["embedding"])[ids]
    np.testing.assert_array_equal(jq.wrap(model, plan).apply(tree, ids), rows)
