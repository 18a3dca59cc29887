"""State of sites: it meets its site with the right slice, whatever the model does to the weight.

The law throughout: weights that were scaled and put in another order, with the state that undoes
both at the sites, compute what they did before.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import Applied, inputs, small, W8, weight, wrapped
from flax import linen as nn, nnx
from linen_models import CASES
from methods import Informed
from nnx_models import D, Listed, Scanned
from states import COLUMNS, COLUMNS_A16, quantized, state, undone, with_state
from transforms import K, ROWS

import jaxquant as jq
from jaxquant.intercept import stamped
from jaxquant.intercept._states import abstract_states
from jaxquant.intercept._variables import states_of, unstamped


def _whole(model, variables, *args, recipe=COLUMNS_A16, names=("smoothing", "permutation")):
    plan = jq.plan(model, variables, *args, recipe=recipe)
    return plan, with_state(variables, plan, names=names)


def _setting(row):
    model = Applied(row.function, row.shape)
    variables = {"params": {"w": weight(*row.shape, contracted=(-1,))}}
    return model, variables, inputs(4, K)


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_it_is_undone_wherever_a_weight_goes(row, jitted):
    model, variables, x = _setting(row)
    plan, tree = _whole(model, variables, x)
    apply = wrapped(model, plan).apply
    got = (jax.jit(apply) if jitted else apply)(tree, x)
    jax.tree.map(np.testing.assert_array_equal, got, model.apply(variables, x))


def test_without_it_the_rows_compute_something_else():
    row = ROWS[0]
    model, variables, x = _setting(row)
    plan, tree = _whole(model, variables, x)
    bare = stamped(unstamped(tree)[0], plan.fingerprint)
    got, want = wrapped(model, plan).apply(bare, x), model.apply(variables, x)
    assert not jnp.array_equal(got, want)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_undone_in_every_linen_model(case):
    variables = case.model.init(jax.random.key(0), *case.args)
    rules = tuple(jq.Rule(match=name, optional=True) for name in case.left)
    # Lookups share rows with products only where a row has one scale.
    scheme = dataclasses.replace(COLUMNS, tile=jq.PER_TENSOR)
    rules += (jq.Rule(match="*embed*", weights=scheme, optional=True),)
    rules += (jq.Rule(match="*", weights=COLUMNS),)
    model, options = case.model, case.options()
    plan = jq.plan(model, variables, *case.args, recipe=jq.Recipe(name="r", rules=rules), **options)
    tree = with_state(variables, plan)
    plain = quantized(variables, plan, {})
    apply = jq.wrap(model, plan, backend="xla").apply
    got, want = (apply(t, *case.args, **case.options()) for t in (tree, plain))
    tolerance = 2e-5 if case.dtype == jnp.float32 else 3e-2

    def close(a, b):
        if hasattr(a, "dtype") and jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_allclose(
                a.astype(jnp.float32), b.astype(jnp.float32), rtol=tolerance, atol=tolerance
            )

    jax.tree.map(close, got, want)


@pytest.mark.parametrize("row", [r for r in ROWS if r.reverse and "custom" not in r.name], ids=str)
def test_gradients_are_those_of_the_plain_model(row):
    model, variables, x = _setting(row)
    plan, tree = _whole(model, variables, x)
    apply = wrapped(model, plan).apply

    def loss(x, apply, tree):
        outs = [y for y in jax.tree.leaves(apply(tree, x)) if jnp.issubdtype(y.dtype, jnp.floating)]
        return sum(jnp.square(y).sum() for y in outs)

    got, want = (jax.grad(loss)(x, f, t) for f, t in ((apply, tree), (model.apply, variables)))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("row", [r for r in ROWS if "custom_vjp" in r.name], ids=str)
def test_a_users_derivative_rule_is_refused(row):
    model, variables, x = _setting(row)
    plan, tree = _whole(model, variables, x)
    with pytest.raises(jq.PlanError, match="held for w#dot, with a smoothing .*differentiated"):
        jax.grad(lambda x: wrapped(model, plan).apply(tree, x).sum())(x)


def test_it_composes_with_vmap_and_with_nnx():
    model, variables, x = _setting(ROWS[3])
    plan, tree = _whole(model, variables, x)
    xs = jnp.stack([x, x + 1])
    got = jax.vmap(wrapped(model, plan).apply, in_axes=(None, 0))(tree, xs)
    np.testing.assert_array_equal(got, jax.vmap(model.apply, in_axes=(None, 0))(variables, xs))


@pytest.mark.parametrize("make", [Listed, Scanned])
def test_nnx_models_hold_it(make):
    model, x = make(nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (3, D))
    plan = jq.plan(model, nnx.state(model), x, recipe=COLUMNS_A16)
    tree = with_state(nnx.state(model), plan)
    want = jq.wrap(model, plan, quantized(nnx.state(model), plan, {}), backend="xla")(x)
    qmodel = jq.wrap(model, plan, tree, backend="xla")
    for got in (qmodel(x), qmodel.apply(tree, x), nnx.jit(lambda m, x: m(x))(qmodel, x)):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    other = with_state(nnx.state(model), plan, seed=1)
    # What the call is given counts, not what the model holds.
    np.testing.assert_allclose(qmodel.apply(other, x), want, rtol=2e-5, atol=2e-5)


def test_an_interceptor_finds_it():
    model, x = CASES[0].model, CASES[0].args[0]
    variables = model.init(jax.random.key(0), x)
    plan, tree = _whole(model, variables, x)
    with nn.intercept_methods(jq.interceptor(plan, backend="xla")):
        got = model.apply(tree, x)
    want = jq.wrap(model, plan, backend="xla").apply(tree, x)
    np.testing.assert_array_equal(got, want)


SLICED = {
    "one layer": (lambda x, w: x @ w[1], (3, K, K)),
    "layers one by one": (lambda x, w: small(small(x @ w[0]) @ w[1]) @ w[2], (3, K, K)),
    "a part of the stack": (
        lambda x, w: jax.lax.scan(lambda x, w: (small(x @ w), None), x, w[1:])[0],
        (3, K, K),
    ),
    "split": (lambda x, w: [x @ part[0] for part in jnp.split(w, 3)], (3, K, K)),
    "columns of outputs": (lambda x, w: (x @ w[:, :3], x @ w[:, 3:]), (K, K)),
    "merged stacks": (
        lambda x, w: jax.lax.scan(
            lambda x, w: (small(x @ w), None), x, w.reshape(-1, K, K)
        )[0],
        (2, 3, K, K),
    ),
    "the second stack first": (
        lambda x, w: jax.lax.scan(
            lambda x, w: (small(jnp.einsum("enk,ekf->enf", x, w)), None),
            jnp.stack([x, x + 1]),
            w.transpose(1, 0, 2, 3),
        )[0],
        (2, 3, K, K),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SLICED)
def test_slices_of_stacks_take_theirs(name):
    function, shape = SLICED[name]
    model, x = Applied(function, shape), inputs(4, K)
    variables = {"params": {"w": weight(*shape, contracted=(-1,))}}
    plan, tree = _whole(model, variables, x)
    got = wrapped(model, plan).apply(tree, x)
    jax.tree.map(np.testing.assert_array_equal, got, model.apply(variables, x))


def test_parts_of_stack_axes_are_refused():
    def split(x, w):
        w = w.reshape(2, 2, K, K)
        return jax.lax.scan(lambda x, w: (small(small(x @ w[0]) @ w[1]), None), x, w)[0]

    model, x = Applied(split, (4, K, K)), inputs(4, K)
    variables = {"params": {"w": weight(4, K, K, contracted=(-1,))}}
    plan, tree = _whole(model, variables, x)
    with pytest.raises((jq.PlanError, ValueError), match="stack axes"):
        wrapped(model, plan).apply(tree, x)


def test_other_readings_of_such_a_weight_are_refused():
    def penalized(x, w):
        return x @ w, jnp.square(w).sum()

    model, x = Applied(penalized, (K, K)), inputs(4, K)
    variables = {"params": {"w": weight(K, K, contracted=(-1,))}}
    rule = jq.Rule(match="*", weights=COLUMNS, elsewhere="dequantize")
    plan, tree = _whole(model, variables, x, recipe=jq.Recipe(name="r", rules=(rule,)))
    with pytest.raises(jq.PlanError, match="w is held for w#dot, with a smoothing .*read as an"):
        wrapped(model, plan).apply(tree, x)


def test_another_site_without_it_is_refused():
    model, x = Applied(lambda x, w: small(x @ w) @ w, (K, K)), inputs(4, K)
    variables = {"params": {"w": weight(K, K, contracted=(-1,))}}
    plan = jq.plan(model, variables, x, recipe=COLUMNS_A16)
    states = state(plan)
    scaled = undone(variables, plan, states)
    full = quantized(scaled, plan, states)
    np.testing.assert_array_equal(wrapped(model, plan).apply(full, x), model.apply(variables, x))
    del states["w#dot.1"]
    with pytest.raises(jq.PlanError, match="held for w#dot, .*read by w#dot.1"):
        wrapped(model, plan).apply(quantized(scaled, plan, states), x)


def test_state_that_the_plan_does_not_know_is_refused():
    model, variables, x = _setting(ROWS[0])
    plan = jq.plan(model, variables, x, recipe=COLUMNS_A16)
    tree = quantized(variables, plan, {"v#dot": {"smoothing": jnp.ones(K)}})
    with pytest.raises(jq.PlanError, match="hold state of v#dot, which the plan"):
        wrapped(model, plan).apply(tree, x)


STATIC = jq.Recipe(
    name="static",
    rules=(
        jq.Rule(
            match="*",
            weights=W8,
            activations=jq.Scheme(values=jq.INT8, tile=jq.PER_TENSOR),
            static=True,
        ),
    ),
)


def test_what_the_plan_needs_has_to_be_there():
    model, variables, x = _setting(ROWS[3])
    plan = jq.plan(model, variables, x, recipe=STATIC)
    assert abstract_states(plan)["w#dot"]["scale"].shape == (3, 1)
    with pytest.raises(jq.PlanError, match="w#dot has static activations, .* no 'scale' for it"):
        wrapped(model, plan).apply(quantized(variables, plan, {}), x)
    states = {"w#dot": {"scale": jnp.ones((3, 1))}}
    wrapped(model, plan).apply(quantized(variables, plan, states), x)


def test_a_call_that_reaches_other_sites_is_refused():
    def function(x, w, twice=False):
        y = x @ w
        return y @ w if twice else y

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, twice=False):
            w = self.param("w", nn.initializers.zeros, (K, K))
            return function(x, w, twice)

    variables, x = {"params": {"w": weight(K, K)}}, inputs(4, K)
    plan = jq.plan(Model(), variables, x, recipe=STATIC)
    tree = quantized(variables, plan, {"w#dot": {"scale": jnp.ones(1)}})
    with pytest.raises(jq.PlanError, match="w#dot.1, for which calibration fixed no scale"):
        jq.wrap(Model(), plan).apply(tree, x, twice=True)


def test_tiles_that_do_not_fill_the_inputs_are_refused_by_the_plan():
    model, variables, x = _setting(ROWS[0])
    tile = jq.Tile(contracted=3, kept=None)
    rule = dataclasses.replace(STATIC.rules[0], activations=jq.Scheme(values=jq.INT8, tile=tile))
    with pytest.raises(jq.PlanError, match="Tiles of 3 do not fill the 8 inputs of w#dot"):
        jq.plan(model, variables, x, recipe=jq.Recipe(name="r", rules=(rule,)))


def test_a_wrapped_nnx_model_without_its_state_is_refused():
    model, x = Listed(nnx.Rngs(0)), jnp.ones((3, D))
    recipe = jq.Recipe(name="r", rules=(jq.Rule(match="*", weights=W8, algorithm=Informed()),))
    plan = jq.plan(model, nnx.state(model), x, recipe=recipe)
    held = nnx.merge(nnx.graphdef(model), unstamped(quantized(nnx.state(model), plan, {}))[0])
    with pytest.raises(jq.PlanError, match="which the model has not. Give the quantized"):
        jq.wrap(held, plan)


def test_it_is_stored_in_its_own_collection():
    model, variables, x = _setting(ROWS[3])
    plan, tree = _whole(model, variables, x, names=("smoothing",))
    assert set(tree["jaxquant"]["sites"]["w#dot"]) == {"smoothing"}
    assert states_of(tree)["w#dot"]["smoothing"].shape == (3, K)
