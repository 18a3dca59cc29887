"""A wrapped Linen model does what the plain one does with dequantized weights, state included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import assert_close, compiled, dequantized, W8, W8A8, W8A16
from flax import linen as nn
from linen_models import Block, Case, CASES, Crossed, D, Decode, InSetup, Scanned, Tied

import jaxquant as jq

every_case = pytest.mark.parametrize("case", CASES, ids=str)


def quantized(case: Case, recipe: jq.Recipe = W8A16):
    """The variables of a case, its plan, and its quantized variables."""
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    kept = {k: v for k, v in case.options().items() if k in ("train", "scale", "flag")}
    variables = jax.jit(lambda *args: case.model.init(rngs, *args, **kept))(*case.args)
    variables.pop("intermediates", None)
    rules = (*(jq.Rule(match=path, optional=True) for path in case.left), *recipe.rules)
    recipe = jq.Recipe(name=recipe.name, rules=rules)
    plan = jq.plan(case.model, variables, *case.args, recipe=recipe, **case.options())
    return variables, plan, jq.quantize(variables, plan)


def _first_array(tree) -> jax.Array:
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    return arrays[0].astype(jnp.float32)


def _both(case, plan, qvariables):
    """What the plain model puts out, and what the wrapped one does."""

    def outputs(apply, variables):
        return compiled(lambda v, *args: apply(v, *args, **case.options()), variables, *case.args)

    wrapped = jq.wrap(case.model, plan)
    return outputs(case.model.apply, dequantized(qvariables)), outputs(wrapped.apply, qvariables)


@every_case
def test_apply_equals_the_plain_model_on_dequantized_weights(case):
    _, plan, qvariables = quantized(case)
    assert plan.leaves
    want, got = _both(case, plan, qvariables)
    assert_close(got, want, case.dtype)


@every_case
def test_rounded_activations_stay_near_the_plain_model(case):
    _, plan, qvariables = quantized(case, W8A8)
    want, got = _both(case, plan, qvariables)
    wanted, found = (_first_array(tree) for tree in (want, got))
    assert jnp.abs(wanted - found).max() > 0
    # A row's rounding is off by at most half of 1/127 of its peak; there are up to seven products.
    assert jnp.linalg.norm(wanted - found) < 7 / 127 * jnp.linalg.norm(wanted)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_the_axis_of_scanned_layers_is_found_and_has_scales_of_its_own(axis):
    case = Case(model=Scanned(axis=axis))
    variables, plan, qvariables = quantized(case)
    site = plan.by_site["layers/Dense_0/kernel#dot"]
    want = ["contracted", "kept"]
    want.insert(axis % 3, "stack")
    assert site.roles == tuple(want)
    q = qvariables["params"]["layers"]["Dense_0"]["kernel"]
    assert q.shape == variables["params"]["layers"]["Dense_0"]["kernel"].shape
    assert q.scale.shape == tuple(
        1 if r == "contracted" else n for r, n in zip(want, q.shape, strict=True)
    )
    stats = jq.observe(case.model, variables, [case.args])
    assert stats["layers/Dense_0/kernel#dot"]["peak"].shape == (3, D)
    assert stats["layers/Dense_1/kernel#dot"]["peak"].shape == (3, 2 * D)


def test_observed_layers_see_what_the_unrolled_layers_see():
    case = Case(model=Scanned())
    variables, _, _ = quantized(case)
    stats = jq.observe(case.model, variables, [case.args])["layers/Dense_0/kernel#dot"]
    x = case.args[0]
    for i in range(3):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], variables["params"]["layers"])
        normed = nn.LayerNorm().apply({"params": layer["LayerNorm_0"]}, x)
        assert_close(stats["peak"][i], jnp.abs(normed).max(0))
        assert_close(stats["moments"]["square"][i], jnp.square(normed).sum(0))
        x = Block().apply({"params": layer}, x)[0]


def test_a_tied_embedding_is_one_qarray_read_by_two_sites():
    case = Case(model=Tied(), args=(jnp.array([[1, 2]]),))
    _, plan, qvariables = quantized(case)
    assert {s.site for s in plan.sites if s.path == "embed/embedding"} == {
        "embed/embedding#take",
        "embed/embedding#dot",
    }
    assert [leaf.path for leaf in plan.leaves].count("embed/embedding") == 1
    assert isinstance(qvariables["params"]["embed"]["embedding"], jq.QArray)


def test_two_uses_of_one_weight_are_two_sites_that_must_agree():
    case = Case(model=Crossed())
    with pytest.raises(jq.PlanError, match="leave one of the uses by a rule of its own"):
        quantized(case)


def test_a_use_that_is_left_reads_the_dequantized_weight():
    model, x = Crossed(), jax.random.normal(jax.random.key(1), (4, D))
    variables = model.init(jax.random.key(0), x)
    rules = (jq.Rule(match="w#dot.1"), jq.Rule(match="w#dot", weights=W8, activations=W8))
    plan = jq.plan(model, variables, x, recipe=jq.Recipe(name="one", rules=rules))
    assert [site.site for site in plan.sites] == ["w#dot", "w#dot.1"]
    assert [site.weights for site in plan.sites] == [W8, None]
    qvariables = jq.quantize(variables, plan)
    q = qvariables["params"]["w"]
    first = jq.dot(jq.quantize_activation(x, W8, contracted=(1,)), q)
    want = (jq.dequantize(q) @ first.T).T
    assert_close(jq.wrap(model, plan).apply(qvariables, x), want)


@pytest.mark.parametrize("mode", ["fill", "clip", "wrap"])
def test_ids_out_of_range_do_as_without_us(mode):
    class Lookup(nn.Module):
        @nn.compact
        def __call__(self, ids):
            table = self.param("table", nn.initializers.normal(), (5, D))
            return jnp.take(table, ids, axis=0, mode=mode)

    ids = jnp.array([0, 4, 5, 100, -1, -6])
    case = Case(model=Lookup(), args=(ids,))
    _, plan, qvariables = quantized(case)
    want = case.model.apply(dequantized(qvariables), ids)
    assert bool(jnp.isnan(want).any()) == (mode == "fill")
    got = jq.wrap(case.model, plan).apply(qvariables, ids)
    np.testing.assert_array_equal(got, want)


def test_a_cache_grows_over_several_calls_as_without_us():
    case = Case(model=Decode(), args=(jax.random.normal(jax.random.key(2), (2, 1, D)),))
    model = case.model
    variables = model.init(jax.random.key(0), jnp.zeros((2, 5, D)))
    plan = jq.plan(model, variables, case.args[0], recipe=W8A16, mutable=["cache"])
    qvariables = jq.quantize(variables, plan)
    qmodel, plain = jq.wrap(model, plan), dequantized(qvariables)
    for step in range(3):
        x = case.args[0] + step
        want, state = model.apply(plain, x, mutable=["cache"])
        got, qstate = qmodel.apply(qvariables, x, mutable=["cache"])
        assert_close((got, qstate), (want, state))
        plain, qvariables = {**plain, **state}, {**qvariables, **qstate}
    assert int(qvariables["cache"]["attention"]["cache_index"]) == 3


def test_parameters_that_come_back_unwritten_are_still_codes():
    case = Case(model=Scanned())
    _, plan, qvariables = quantized(case)
    _, state = jq.wrap(case.model, plan).apply(qvariables, *case.args, mutable=True)
    kernel = state["params"]["layers"]["Dense_0"]["kernel"]
    assert kernel.codes is qvariables["params"]["layers"]["Dense_0"]["kernel"].codes


def test_repeated_calls_trace_once():
    calls = []

    class Counted(nn.Module):
        @nn.compact
        def __call__(self, x):
            calls.append(1)
            return InSetup()(x)

    case = Case(model=Counted())
    _, plan, qvariables = quantized(case)
    step = jax.jit(jq.wrap(case.model, plan).apply)
    calls.clear()
    for i in range(3):
        step(qvariables, case.args[0] + i)
    assert len(calls) == 1
