"""The walk over a model's equations: site ids, the user's names and lines, what XLA compiles."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import Applied, inputs, W8, W8A8, W8A16, weight, wrapped
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jaxquant as jq
from jaxquant.intercept import PlanStamp

K = 8
X = inputs(4, K)


def _setting(function, shape=(K, K), x=X, recipe=W8A16):
    model, variables = Applied(function, shape), {"params": {"w": weight(*shape)}}
    plan = jq.plan(model, variables, x, recipe=recipe)
    return model, plan, jq.quantize(variables, plan)


def test_site_ids_count_uses_in_the_order_of_the_program():
    def function(x, w):
        y = jax.jit(lambda x: x @ w)(x)
        y = lax.fori_loop(0, 2, lambda i, y: jnp.clip(y @ w, -4, 4), y)
        return jnp.take(w, jnp.arange(3), axis=1), y @ w

    rules = (jq.Rule(match="*#take"), *W8A8.rules)
    _, plan, _ = _setting(function, recipe=jq.Recipe(name="r", rules=rules))
    assert [s.site for s in plan.sites] == ["w#dot", "w#dot.1", "w#take", "w#dot.2"]


def test_each_site_does_what_its_own_plan_says():
    """Only the second of three uses is left: the plan's numbers are the call's numbers."""

    def function(x, w):
        a = jax.checkpoint(lambda x: x @ w)(x)
        b = lax.cond(x.sum() > -1e9, lambda x: x @ w, lambda x: x, x + 0.25)
        return a, b, (x + 0.5) @ w

    rules = (jq.Rule(match="w#dot.1", weights=W8), *W8A8.rules)
    model, plan, qvariables = _setting(function, recipe=jq.Recipe(name="r", rules=rules))
    q, x = qvariables["params"]["w"], X / 3
    got = wrapped(model, plan).apply(qvariables, x)

    def rounded(x):
        return jq.quantize_activation(x, W8, contracted=(1,))

    want = jq.dot(rounded(x), q), (x + 0.25) @ jq.dequantize(q), jq.dot(rounded(x + 0.5), q)
    for found, expected in zip(got, want, strict=True):
        np.testing.assert_allclose(
            found, expected, rtol=0, atol=1e-6 * float(jnp.abs(want[0]).max())
        )
    assert jnp.abs(got[0] - x @ jq.dequantize(q)).max() > 0.01


def test_a_body_called_twice_is_two_sites():
    @jax.jit
    def layer(x, w):
        return jnp.clip(x @ w, -4, 4)

    _, plan, _ = _setting(lambda x, w: layer(layer(x, w), w))
    assert [s.site for s in plan.sites] == ["w#dot", "w#dot.1"]


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.T.T,
        lambda w: w[...],
        lambda w: w[None][0],
        lambda w: w.reshape(2, 4, K).reshape(K, K),
        lambda w: w.astype(jnp.bfloat16).astype(jnp.float32),
        lambda w: jnp.concatenate(jnp.split(w, 2, axis=1)[:1] * 1, axis=1),
        lambda w: lax.stop_gradient(w),
        lambda w: jnp.asarray(w),
        lambda w: jnp.array(w, copy=True),
        lambda w: jnp.swapaxes(w, 0, 1).swapaxes(0, 1),
        lambda w: checkpoint_name(w, "w"),
        lambda w: jax.jit(lambda w: w)(w),
        lambda w: jax.checkpoint(lambda w: w)(w),
        lambda w: lax.dynamic_slice_in_dim(w, 0, K, 0),
        lambda w: lax.optimization_barrier(w),
        lambda w: jax.device_put(w),
    ],
)
def test_provenance_is_followed_through_views(view):
    model, plan, qvariables = _setting(lambda x, w: x @ view(w)[:, :4])
    assert [s.site for s in plan.sites] == ["w#dot"]
    want = X @ weight(K, K)[:, :4]
    np.testing.assert_array_equal(jax.jit(wrapped(model, plan).apply)(qvariables, X), want)


class Named(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(64, name="up")(x)
        with jax.named_scope("in_between"):
            x = nn.relu(x)
        return nn.Dense(8, name="down")(x)


def _op_names(text):
    return re.findall(r'op_name="([^"]*)"', text)


@pytest.mark.parametrize("how", ["wrap", "interceptor"])
def test_compiled_dots_are_named_after_their_modules(how):
    variables = Named().init(jax.random.key(0), X)
    plan = jq.plan(Named(), variables, X, recipe=W8A8)
    qvariables = jq.quantize(variables, plan)
    if how == "wrap":
        text = jax.jit(jq.wrap(Named(), plan, backend="xla").apply).lower(qvariables, X)
    else:
        with nn.intercept_methods(jq.interceptor(plan, backend="xla")):
            text = jax.jit(Named().apply).lower(qvariables, X)
    names = _op_names(text.compile().as_text())
    assert any(re.search(r"Named/up.*dot_general", name) for name in names), names
    assert any(re.search(r"Named/down.*dot_general", name) for name in names), names
    assert not any("Named/Named" in name for name in names)
    plain = _op_names(jax.jit(Named().apply).lower(variables, X).compile().as_text())
    assert any("in_between" in name for name in names) == any("in_between" in n for n in plain)


def test_errors_point_at_the_users_line():
    def function(x, w):
        y = x @ w
        return y + jnp.square(w).sum()  # the line that is meant

    model, variables = Applied(function, (K, K)), {"params": {"w": weight(K, K)}}
    rule = jq.Rule(match="*", weights=W8, elsewhere="dequantize")
    plan = jq.plan(model, variables, X, recipe=jq.Recipe(name="r", rules=(rule,)))
    qvariables = jq.quantize(variables, plan)
    strict = dataclasses.replace(
        plan, leaves=tuple(dataclasses.replace(leaf, elsewhere="error") for leaf in plan.leaves)
    )
    qvariables["jaxquant"] = {"plan": PlanStamp(strict.fingerprint)}
    with pytest.raises(jq.PlanError, match=r"at .*test_evaluate.py:\d+"):
        jq.wrap(model, strict).apply(qvariables, X)


def _compiled(model, variables, *args, recipe):
    plan = jq.plan(model, variables, *args, recipe=recipe)
    qvariables = jq.prepare(jq.quantize(variables, plan), plan, backend="xla")
    return jax.jit(wrapped(model, plan).apply).lower(qvariables, *args).compile().as_text()


def _moves(text, at_least):
    """Instructions that only move or convert so many elements or more, outside of fusions."""
    found = []
    for line in text.splitlines():
        match = re.match(
            r"\s*(?:ROOT )?%?\S+ = \w+\[([\d,]+)\]\S* (copy|transpose|convert|reshape)\(", line
        )
        if match and np.prod([int(n) for n in match[1].split(",")]) >= at_least:
            found.append(line.strip())
    return found


class Wide(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(512, name="up")(x))
        return nn.Dense(256, name="down")(x)


@pytest.mark.parametrize("recipe", [W8A8, W8A16], ids=lambda r: r.name)
def test_no_copy_or_transpose_of_a_weight_is_compiled(recipe):
    x = jnp.ones((2, 256))
    variables = Wide().init(jax.random.key(0), x)
    text = _compiled(Wide(), variables, x, recipe=recipe)
    assert [m for m in _moves(text, 256 * 512) if "convert(" not in m] == []


class WideScanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            lambda module, x: (module(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return layers(Wide(name="layers"), x)[0]


@pytest.mark.parametrize("recipe", [W8A8, W8A16], ids=lambda r: r.name)
def test_no_copy_or_transpose_of_scanned_layers_is_compiled(recipe):
    x = jnp.ones((2, 256))
    variables = WideScanned().init(jax.random.key(0), x)
    text = _compiled(WideScanned(), variables, x, recipe=recipe)
    assert [m for m in _moves(text, 256 * 512) if "convert(" not in m] == []


def test_a_loop_without_weights_is_bound_as_it_is():
    def function(x, w):
        return lax.fori_loop(0, 3, lambda i, x: jnp.clip(x + 1, -4, 4), x @ w)

    model, plan, qvariables = _setting(function)
    qmodel = wrapped(model, plan)
    here, there = (
        [str(e) for e in jax.make_jaxpr(f)(v, X).eqns if e.primitive.name == "scan"]
        for f, v in ((model.apply, {"params": {"w": weight(K, K)}}), (qmodel.apply, qvariables))
    )
    assert len(here) == len(there) == 1


def test_effects_inside_survive():
    seen = []

    def function(x, w):
        def body(x, w):
            jax.debug.callback(lambda s: seen.append(float(s)), x.sum())
            return jnp.clip(x @ w, -4, 4), None

        return lax.scan(body, x, w)[0]

    model, plan, qvariables = _setting(function, (3, K, K))
    want = model.apply({"params": {"w": weight(3, K, K)}}, X)
    jax.effects_barrier()
    expected, seen[:] = sorted(seen), []
    got = jax.jit(wrapped(model, plan).apply)(qvariables, X)
    jax.effects_barrier()
    np.testing.assert_array_equal(got, want)
    assert sorted(seen) == expected and len(seen) == 3


def test_platform_dependent_branches_are_lowered_for_their_platform():
    def function(x, w):
        return lax.platform_dependent(x, cpu=lambda x: x @ w, default=lambda x: 2 * (x @ w))

    model, plan, qvariables = _setting(function)
    got = jax.jit(wrapped(model, plan).apply)(qvariables, X)
    np.testing.assert_array_equal(got, X @ weight(K, K))
