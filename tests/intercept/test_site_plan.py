"""Sites of a plan: what rules add beside schemes, and what the sites of a parameter agree on."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from exact import Applied, inputs, W8, weight
from flax import linen as nn
from methods import Free, Informed, Smooth

import jaxquant as jq
from jaxquant.ops import Outliers, OutlierWeights
from jaxquant.training import StraightThrough, Training

K = 8


def _plan(function, rules):
    variables = {"params": {"w": weight(K, K)}}
    recipe = jq.Recipe(name="test", rules=tuple(rules))
    return jq.plan(Applied(function, (K, K)), variables, inputs(4, K), recipe=recipe)


def _rule(match="*", **kwargs):
    return jq.Rule(match=match, **{"weights": W8, **kwargs})


TENSOR8 = dataclasses.replace(W8, tile=jq.PER_TENSOR)
ADDED = [
    {},
    {"algorithm": Informed()},
    {"algorithm": Informed(damping=0.5)},
    {"algorithm": Free()},
    {"scaling": Smooth()},
    {"scaling": Smooth(alpha=0.8)},
    {"static": True},
    {"outliers": Outliers()},
    {"outliers": Outliers(weights=OutlierWeights.ORIGINAL)},
]


def test_each_of_what_a_rule_adds_is_in_the_site_and_in_the_digest():
    plans = [_plan(jnp.matmul, [_rule(activations=TENSOR8, **added)]) for added in ADDED]
    assert len({plan.fingerprint for plan in plans}) == len(ADDED)
    for plan, added in zip(plans, ADDED, strict=True):
        assert {key: getattr(plan.sites[0], key) for key in added} == added
    needy = [plan.needs_calibration for plan in plans]
    assert needy == [("w#dot",) if i in (1, 2, 4, 5, 6, 8) else () for i in range(len(ADDED))]
    assert plans[1].algorithms == {"w": Informed()} and plans[0].algorithms == {}


def test_lookups_take_of_it_what_needs_no_inputs():
    model, ids = nn.Embed(5, K), jnp.zeros(2, int)
    variables = jax.eval_shape(model.init, jax.random.key(0), ids)
    for added in ADDED:
        recipe = jq.Recipe(name="r", rules=(_rule(activations=TENSOR8, **added),))
        plan = jq.plan(model, variables, ids, recipe=recipe)
        (site,) = plan.sites
        assert not site.needs_calibration and not site.static
        assert (site.scaling, site.outliers) == (None, None)
        assert site.algorithm == (Free() if added.get("algorithm") == Free() else None)


def test_data_decide_static_ranges_of_convolutions_and_nothing_else():
    model, x = nn.Conv(K, (3,)), inputs(2, 5, K)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    recipe = jq.Recipe(name="r", rules=(_rule(activations=TENSOR8, static=True),))
    assert jq.plan(model, variables, x, recipe=recipe).needs_calibration == ("kernel#conv",)
    recipe = jq.Recipe(name="r", rules=(_rule(activations=TENSOR8, algorithm=Informed()),))
    with pytest.raises(jq.PlanError, match="kernel#conv is a convolution, for which data decide"):
        jq.plan(model, variables, x, recipe=recipe)
    recipe = jq.Recipe(name="r", rules=(_rule(activations=W8, outliers=Outliers()),))
    with pytest.raises(jq.PlanError, match="kernel#conv is no dot, and only dots keep"):
        jq.plan(model, variables, x, recipe=recipe)


def test_ragged_products_have_no_static_scales():
    def function(x, w):
        return jax.lax.ragged_dot(x, w, jnp.array([1, 3], jnp.int32))

    variables = {"params": {"w": weight(2, K, K)}}
    for added, refused in (({"static": True}, True), ({"algorithm": Informed()}, False)):
        recipe = jq.Recipe(name="r", rules=(_rule(activations=TENSOR8, **added),))
        args = (Applied(function, (2, K, K)), variables, inputs(4, K))
        if refused:
            with pytest.raises(jq.PlanError, match="w#ragged_dot deals its inputs out to experts"):
                jq.plan(*args, recipe=recipe)
        else:
            rule = dataclasses.replace(recipe.rules[0], activations=None)
            assert jq.plan(*args, recipe=jq.Recipe(name="r", rules=(rule,))).needs_calibration


def test_uses_that_would_choose_codes_differently_are_refused():
    def tied(x, w):
        return (x @ w) @ w

    for first, second, said in [
        ({"algorithm": Informed()}, {}, "would choose the codes of w by Informed"),
        ({"scaling": Smooth()}, {}, "with the scalings Smooth.*and None"),
        (
            {"training": Training(weights=StraightThrough(clipped=True))},
            {"training": Training(weights=StraightThrough())},
            r"would round w in training by StraightThrough\(clipped=True\) and Straight",
        ),
    ]:
        with pytest.raises(jq.PlanError, match=said):
            _plan(tied, [_rule("w#dot", **first), _rule("w#dot.1", **second)])
        assert _plan(tied, [_rule("w*", **first)]).leaves


def test_a_scaled_weight_is_not_read_elsewhere():
    def looked_up(x, w):
        return x @ w, w[jnp.zeros(2, int)]

    rows = dataclasses.replace(W8, tile=jq.PER_TENSOR)
    with pytest.raises(jq.PlanError, match="with the scalings"):
        _plan(looked_up, [_rule(weights=rows, scaling=Smooth())])
    with pytest.raises(jq.PlanError, match="elsewhere='dequantize' would let others read it"):
        _plan(lambda x, w: (x @ w, w.sum()), [_rule(scaling=Smooth(), elsewhere="dequantize")])


def test_a_site_that_is_left_does_not_read_a_scaled_weight():
    with pytest.raises(jq.PlanError, match="with the scalings Smooth.*and None"):
        _plan(lambda x, w: (x @ w) @ w, [jq.Rule(match="w#dot.1"), _rule(scaling=Smooth())])
    rules = [jq.Rule(match="w#dot.1"), _rule(algorithm=Informed())]
    assert _plan(lambda x, w: (x @ w) @ w, rules).algorithms == {"w": Informed()}
