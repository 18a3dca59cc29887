"""Plans: what a recipe does to a model, what it refuses, and how it says so."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from exact import Applied, inputs, W8, W8A8, W8A16, weight
from flax import linen as nn

import jaxquant as jq

K = 8
X = inputs(4, K)


def _plan(function, rules=W8A16.rules, shape=(K, K)):
    variables = {"params": {"w": weight(*shape)}}
    return jq.plan(
        Applied(function, shape), variables, X, recipe=jq.Recipe(name="test", rules=tuple(rules))
    )


def _rule(match="*", **kwargs):
    return jq.Rule(match=match, **{"weights": W8, **kwargs})


def test_a_rule_that_matches_nothing_is_an_error():
    with pytest.raises(jq.PlanError, match="the rule 'v' matches nothing"):
        _plan(jnp.matmul, [_rule("v"), _rule()])
    assert _plan(jnp.matmul, [_rule("v", optional=True), _rule()]).leaves


def test_a_site_that_no_rule_matches_is_an_error():
    with pytest.raises(jq.PlanError, match="no rule matches w#dot.1; add one"):
        _plan(lambda x, w: x @ w @ w, [_rule("w#dot")])


def test_all_problems_are_listed_at_once():
    with pytest.raises(jq.PlanError) as error:
        _plan(lambda x, w: x @ w @ w, [_rule("a"), _rule("b"), _rule("w#dot")])
    for part in ("'a' matches", "'b' matches", "no rule matches w#dot.1", "has 2 sites: w#dot"):
        assert part in str(error.value)


def test_a_site_that_is_left_on_purpose_keeps_its_reason():
    plan = _plan(jnp.matmul, [jq.Rule(match="w"), _rule("z", optional=True)])
    assert plan.leaves == () and plan.sites[0].reason == "left by the rule 'w'"


def test_rules_may_name_one_use():
    rules = [jq.Rule(match="w#dot.1"), _rule("w#dot", activations=W8)]
    plan = _plan(lambda x, w: x @ w @ w, rules)
    assert [s.weights for s in plan.sites] == [W8, None]
    assert [s.activations for s in plan.sites] == [W8, None]


def test_the_first_rule_that_matches_decides():
    plan = _plan(jnp.matmul, [jq.Rule(match="w"), _rule(optional=True)])
    assert plan.leaves == ()


def test_uses_that_would_hold_a_weight_differently_are_refused():
    with pytest.raises(jq.PlanError, match="w#dot.1 would hold w as int8 channel with tiles"):
        _plan(lambda x, w: (x @ w) @ w.T)


def test_a_derived_weight_is_listed_and_an_error_unless_left():
    def normed(x, w):
        return x @ (w / jnp.linalg.norm(w, axis=0, keepdims=True))

    with pytest.raises(jq.PlanError, match="w#dot cannot be quantized: it reads w only through"):
        _plan(normed)
    assert "only through" in str(_plan(normed, [jq.Rule(match="w")]).sites[0].reason)


def test_a_weight_that_is_masked_is_a_derived_weight():
    def masked(x, w):
        return x @ jnp.where(jnp.tril(jnp.ones((K, K), bool)), w, 0.0)

    with pytest.raises(jq.PlanError, match="w#dot cannot be quantized: it reads w only through"):
        _plan(masked)


def test_other_readings_of_a_quantized_weight_need_a_word():
    def penalized(x, w):
        return x @ w, jnp.square(w).sum()

    with pytest.raises(jq.PlanError, match="also needed as an array by: .*dequantize"):
        _plan(penalized)
    plan = _plan(penalized, [_rule(elsewhere="dequantize")])
    model = Applied(penalized, (K, K))
    variables = {"params": {"w": weight(K, K)}}
    qvariables = jq.quantize(variables, plan)
    got = jq.wrap(model, plan, backend="xla").apply(qvariables, X)
    want = model.apply(variables, X)
    assert all(map(jnp.array_equal, got, want))


def test_a_weight_that_the_model_returns_is_another_reading():
    with pytest.raises(jq.PlanError, match="the model returns it"):
        _plan(lambda x, w: (x @ w, w))


def test_what_is_not_computed_on_codes_is_listed_with_its_reason():
    def function(x, w):
        return jax.lax.conv_general_dilated(w[:, None], x[:, None], (1,), "SAME")

    x = inputs(K, 3)
    reason = "the weight is what is convolved, not the kernel"
    model, variables = Applied(function, (K, K)), {"params": {"w": weight(K, K)}}
    with pytest.raises(jq.PlanError, match=f"w#conv cannot be quantized: {reason}"):
        jq.plan(model, variables, x, recipe=W8A16)
    left = jq.Recipe(name="r", rules=(jq.Rule(match="*#conv"),))
    site = jq.plan(model, variables, x, recipe=left).by_site["w#conv"]
    assert site.weights is None and site.reason == reason


def test_activations_are_rounded_wherever_there_is_a_product():
    model, x = nn.Conv(K, (3,)), inputs(2, 5, K)
    plan = jq.plan(model, jax.eval_shape(model.init, jax.random.key(0), x), x, recipe=W8A8)
    assert plan.by_site["kernel#conv"].activations == W8
    model, ids = nn.Embed(5, K), jnp.zeros(2, int)
    plan = jq.plan(model, jax.eval_shape(model.init, jax.random.key(0), ids), ids, recipe=W8A8)
    assert plan.by_site["embedding#take"].activations is None


def test_a_closed_over_array_is_listed_and_no_error():
    w = weight(K, K, seed=3)
    plan = _plan(lambda x, v: (x @ w) @ v)
    (closed,) = [s for s in plan.sites if s.path.startswith("<closed over")]
    assert closed.reason == "closed over: not among the model's variables"
    assert closed.shape == (K, K)
    with pytest.raises(jq.PlanError, match="matches nothing"):
        _plan(lambda x, v: (x @ w) * v, shape=(4, K))


def test_tiles_that_a_reshape_would_break_are_refused_by_the_plan():
    scheme = dataclasses.replace(W8, tile=jq.Tile(contracted=4))
    rule = jq.Rule(match="w", weights=scheme)

    def split(x, w):
        return jnp.einsum("nab,abk->nk", x.reshape(4, 2, 6), w.reshape(2, 6, K))

    variables = {"params": {"w": weight(12, K)}}
    with pytest.raises(jq.PlanError, match="w is quantized, but needed as an array"):
        jq.plan(
            Applied(split, (12, K)),
            variables,
            inputs(4, 12),
            recipe=jq.Recipe(name="r", rules=(rule,)),
        )


def test_activations_that_tiles_do_not_fill_are_refused_by_the_plan():
    scheme = dataclasses.replace(W8, tile=jq.Tile(contracted=3))
    with pytest.raises(jq.PlanError, match="activations of w#dot cannot be rounded"):
        _plan(jnp.matmul, [_rule(activations=scheme)])


def test_weight_tiles_that_do_not_fill_an_axis_are_refused_by_the_plan():
    scheme = dataclasses.replace(W8, tile=jq.Tile(contracted=3))
    with pytest.raises(jq.PlanError, match="Tiles of 3 do not fill the contracted axes"):
        _plan(jnp.matmul, [_rule(weights=scheme)])


def test_plans_are_equal_only_if_they_do_the_same():
    a, b = _plan(jnp.matmul), _plan(jnp.matmul, W8A8.rules)
    assert a == _plan(jnp.matmul) and hash(a) == hash(_plan(jnp.matmul))
    assert a != b and a.fingerprint != b.fingerprint


def test_bytes_are_counted_packed():
    int4 = dataclasses.replace(W8, values=jq.INT4)
    plan = _plan(jnp.matmul, [_rule(weights=int4)])
    assert (plan.bytes_before, plan.bytes_after) == (4 * K * K, K * K // 2 + 4 * K)


def test_parameters_that_no_site_reads_are_listed_with_what_reads_them():
    model, x = nn.Sequential([nn.Dense(K), nn.LayerNorm()]), inputs(4, K)
    variables = model.init(jax.random.key(0), x)
    plan = jq.plan(model, variables, x, recipe=W8A16)
    assert dict(plan.others) == {
        "layers_0/bias": "add",
        "layers_1/bias": "add",
        "layers_1/scale": "mul",
    }


def test_digests_of_plans_without_what_came_later_stay_what_they_were():
    # From before sites had algorithms: checkpoints hold these.
    wanted = {W8A16: "814b1be882145575", W8A8: "1124705aed92caf2"}
    wanted[jq.recipes.W4A16_G64] = "65b86fe442c3db71"
    variables = {"params": {"w": weight(64, K)}}
    for recipe, digest in wanted.items():
        model = Applied(jnp.matmul, (64, K))
        assert jq.plan(model, variables, inputs(4, 64), recipe=recipe).fingerprint == digest
