"""Products of two activations: listed only when a rule names them, and computed on codes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import W8, W8A16
from flax import linen as nn, nnx
from jax import lax

import jaxquant as jq

D, T, HEADS = 8, 5, 2
X = jax.random.normal(jax.random.key(0), (3, T, D))
INT8 = jq.Scheme(values=jq.INT8, tile=jq.PER_CHANNEL)
LEAVE = jq.Rule(match="*")
ATTENTION = jq.Rule(match="*attention*#product*", products=INT8)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.MultiHeadDotProductAttention(HEADS, name="attention")(x, x), None


class Model(nn.Module):
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        kind = nn.remat(Block) if self.remat else Block
        if self.scan:
            layers = nn.scan(
                kind, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return layers(name="layers")(x, None)[0]
        return kind(name="block")(x)[0]


def _recipe(*rules):
    return jq.Recipe(name="r", rules=rules)


def _setting(model, *rules, x=X):
    variables = model.init(jax.random.key(1), x)
    plan = jq.plan(model, jax.eval_shape(lambda: variables), x, recipe=_recipe(*rules))
    return variables, plan, jq.quantize(variables, plan)


def _rounded(x, axis):
    """Symmetric int8 along `axis`, in float64 but for the scale, which is held in float32."""
    x = np.asarray(x, np.float64)
    scale = (np.abs(x).max(axis=axis, keepdims=True) / 127).astype(np.float32).astype(np.float64)
    return np.clip(np.round(x / scale), -127, 127) * scale


def _attention(params, x):
    """Attention in float64, whose two products round both of their sides."""
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    x = np.asarray(x, np.float64)
    q, k, v = (
        np.einsum("ntd,dhk->nthk", x, p[n]["kernel"]) + p[n]["bias"]
        for n in ("query", "key", "value")
    )
    q = q / np.sqrt(D // HEADS)
    scores = np.einsum("nqhd,nkhd->nhqk", _rounded(q, 3), _rounded(k, 3))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    out = np.einsum("nhqk,nkhd->nqhd", _rounded(weights, 3), _rounded(v, 1))
    return np.einsum("nqhd,hdk->nqk", out, p["out"]["kernel"]) + p["out"]["bias"]


def test_scores_and_values_are_computed_on_codes():
    model = Model()
    variables, plan, qvariables = _setting(model, ATTENTION, LEAVE)
    assert [s.site for s in plan.sites if s.op == "product"] == [
        "Model/block/attention#product",
        "Model/block/attention#product.1",
    ]
    got = jax.jit(jq.wrap(model, plan).apply)(qvariables, X)
    want = _attention(variables["params"]["block"]["attention"], X) + np.asarray(X, np.float64)
    # Codes may differ by one where float32 rounds to the other side of a half: 1/127 of a row.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-3 * np.abs(want).max())
    plain = np.asarray(model.apply(variables, X))
    assert np.abs(np.asarray(got) - want).max() < np.abs(plain - want).max() / 5


def test_the_products_are_of_int8_with_int32_sums():
    model = Model()
    _, plan, qvariables = _setting(model, ATTENTION, LEAVE)
    text = str(jax.make_jaxpr(jq.wrap(model, plan, backend="xla").apply)(qvariables, X))
    assert text.count("preferred_element_type=int32") == 2


@pytest.mark.parametrize("model", [Model(), Model(remat=True), Model(scan=True)], ids=str)
def test_other_recipes_list_no_products(model):
    variables, plan, _ = _setting(model, *W8A16.rules)
    assert all(site.op == "dot" for site in plan.sites)


@pytest.mark.parametrize(
    "model, path",
    [
        (Model(remat=True), "Model/block/attention"),
        (Model(scan=True), "Model/layers/attention"),
        (Model(scan=True, remat=True), "Model/layers/attention"),
    ],
    ids=str,
)
def test_a_product_inside_of_a_body_is_one_site(model, path):
    variables, plan, qvariables = _setting(model, ATTENTION, LEAVE)
    found = [s.site for s in plan.sites if s.op == "product"]
    assert found == [f"{path}#product", f"{path}#product.1"]
    got = jax.jit(jq.wrap(model, plan).apply)(qvariables, X)
    if model.scan:
        want = np.asarray(X, np.float64)
        for i in range(3):
            layer = jax.tree.map(lambda w: w[i], variables["params"]["layers"]["attention"])  # noqa: B023
            want = want + _attention(layer, want)
    else:
        want = _attention(variables["params"]["block"]["attention"], X) + np.asarray(X, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-3 * np.abs(want).max())
    assert np.abs(np.asarray(got) - np.asarray(model.apply(variables, X))).max() > 1e-4


def test_weights_and_products_go_by_rules_of_their_own():
    model = Model()
    rules = (jq.Rule(match="*", products=INT8), jq.Rule(match="*", weights=W8, activations=W8))
    _, plan, qvariables = _setting(model, *rules)
    assert {(s.op, s.weights, s.activations) for s in plan.sites} == {
        ("dot", W8, W8),
        ("product", None, INT8),
    }
    assert jnp.isfinite(jax.jit(jq.wrap(model, plan).apply)(qvariables, X)).all()
    leaves = (jq.Rule(match="*#product.1"), *rules)
    _, plan, _ = _setting(model, *leaves)
    left = plan.by_site["Model/block/attention#product.1"]
    assert left.activations is None and left.reason == "left by the rule '*#product.1'"
    _, plan, _ = _setting(model, jq.Rule(match="*attention#product", products=INT8), LEAVE)
    assert plan.by_site["Model/block/attention#product.1"].reason == "left by the rule '*'"


def test_a_rule_that_names_no_product_matches_nothing():
    with pytest.raises(jq.PlanError, match=r"rule '\*nowhere\*' matches nothing"):
        _setting(Model(), jq.Rule(match="*nowhere*", products=INT8), LEAVE)
    with pytest.raises(jq.PlanError, match=r"rule '\*' matches nothing"):
        _setting(nn.Dense(D), jq.Rule(match="*", products=INT8), LEAVE)


def test_a_rule_speaks_of_weights_or_of_products():
    with pytest.raises(ValueError, match="weights and products of activations"):
        jq.Rule(match="*", weights=W8, products=INT8)


def test_tiles_that_do_not_fit_are_refused_by_the_plan():
    thirds = dataclasses.replace(INT8, tile=jq.Tile(contracted=3))
    rule = jq.Rule(match="*", products=thirds)
    with pytest.raises(jq.PlanError, match="The sides of .*attention#product cannot be rounded"):
        _setting(Model(), rule, LEAVE)


def test_a_call_with_other_products_than_planned_is_refused():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x, twice=False):
            y = nn.Dense(D)(x) @ x.swapaxes(1, 2)
            return y @ y if twice else y

    model = Twice()
    _, plan, qvariables = _setting(model, jq.Rule(match="*", products=INT8), LEAVE)
    with pytest.raises(jq.PlanError, match="Twice#product.1, which is not in the plan"):
        jq.wrap(model, plan).apply(qvariables, X, twice=True)


def test_a_float_weight_is_no_activation():
    """The kernel is left in float: what multiplies it is no product of activations."""

    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(D, name="left")(x) @ x.swapaxes(1, 2)

    variables, plan, qvariables = _setting(Mixed(), jq.Rule(match="*", products=INT8), LEAVE)
    assert [s.site for s in plan.sites] == ["left/kernel#dot", "Mixed#product"]
    got = np.asarray(jq.wrap(Mixed(), plan).apply(qvariables, X), np.float64)
    dense = jax.tree.map(lambda w: np.asarray(w, np.float64), variables["params"]["left"])
    y = np.asarray(X, np.float64) @ dense["kernel"] + dense["bias"]
    want = np.einsum("nij,nkj->nik", _rounded(y, 2), _rounded(X, 2))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-2 * np.abs(want).max())


def test_a_cache_is_an_activation():
    model = nn.MultiHeadDotProductAttention(HEADS, decode=True)
    variables = model.init(jax.random.key(1), X)
    x = X[:, :1]
    recipe = _recipe(jq.Rule(match="*", products=INT8), LEAVE)
    plan = jq.plan(model, variables, x, recipe=recipe, mutable=["cache"])
    assert sum(s.op == "product" for s in plan.sites) == 2
    qvariables = jq.quantize(variables, plan)
    got, _ = jax.jit(lambda v, x: jq.wrap(model, plan).apply(v, x, mutable=["cache"]))(
        qvariables, x
    )
    want, _ = model.apply(variables, x, mutable=["cache"])
    np.testing.assert_allclose(got, want, rtol=0, atol=0.03 * float(jnp.abs(want).max()))


def test_rounded_products_have_no_gradient():
    model = Model()
    _, plan, qvariables = _setting(model, ATTENTION, LEAVE)
    with pytest.raises(TypeError, match="quantizes activations"):
        jax.grad(lambda x: jq.wrap(model, plan).apply(qvariables, x).sum())(X)


def test_nor_inside_of_a_users_rule():
    @jax.custom_jvp
    def square(x):
        return x @ x.swapaxes(1, 2)

    square.defjvp(lambda p, t: (square(*p), 2.0 * t[0] @ p[0].swapaxes(1, 2)))

    class Ruled(nn.Module):
        @nn.compact
        def __call__(self, x):
            return square(nn.Dense(D)(x))

    model = Ruled()
    _, plan, qvariables = _setting(model, jq.Rule(match="*", products=INT8), LEAVE)
    assert plan.by_site["Ruled#product"].activations == INT8
    with pytest.raises(TypeError, match="quantizes activations"):
        jax.grad(lambda x: jq.wrap(model, plan).apply(qvariables, x).sum())(X)


def test_the_interceptor_computes_them_too():
    model = Model()
    _, plan, qvariables = _setting(model, ATTENTION, LEAVE)
    want = jq.wrap(model, plan).apply(qvariables, X)
    with nn.intercept_methods(jq.interceptor(plan)):
        got = model.apply(qvariables, X)
    np.testing.assert_array_equal(got, want)


def test_nnx_puts_no_names_on_the_stack():
    model = nnx.MultiHeadAttention(HEADS, D, rngs=nnx.Rngs(0), decode=False)
    recipe = _recipe(jq.Rule(match="#product*", products=INT8), LEAVE)
    plan = jq.plan(model, nnx.state(model), X, recipe=recipe)
    assert [s.site for s in plan.sites if s.op == "product"] == ["#product", "#product.1"]
    got = jq.wrap(model, plan, jq.quantize(nnx.state(model), plan))(X)
    want = model(X)
    error = np.abs(np.asarray(got) - np.asarray(want)).max()
    assert 0 < error < 0.03 * np.abs(np.asarray(want)).max()


def test_a_users_names_around_the_call_do_not_matter():
    model = Model()
    _, plan, qvariables = _setting(model, ATTENTION, LEAVE)
    apply = jq.wrap(model, plan).apply
    want = jax.vmap(lambda x: apply(qvariables, x[None])[0])(X)
    with jax.named_scope("step"):
        got = lax.map(lambda x: apply(qvariables, x[None])[0], X)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_a_plan_with_products_prints():
    _, plan, _ = _setting(Model(), ATTENTION, LEAVE)
    lines = [line for line in str(plan).splitlines() if "#product" in line]
    assert len(lines) == 2 and all("both sides int8 channel" in line for line in lines)
