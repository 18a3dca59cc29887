"""`nn.intercept_methods(jq.interceptor(plan))`, alone: on whole models and on any submodule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import assert_close, dequantized, W8, W8A8, W8A16
from flax import linen as nn
from linen_models import Block, CASES, D, InSetup, Normed, Scanned, Sown

import jaxquant as jq

every_case = pytest.mark.parametrize("case", CASES, ids=str)
INT4 = jq.Recipe(
    name="int4",
    rules=(jq.Rule(match="*", weights=jq.Scheme(values=jq.INT4, tile=jq.PER_CHANNEL)),),
)
X = jax.random.normal(jax.random.key(5), (4, D))


def _quantized(model, *args, recipe=W8A16, left=(), **options):
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    kept = {k: v for k, v in options.items() if k in ("train", "scale", "flag")}
    variables = dict(jax.jit(lambda *args: model.init(rngs, *args, **kept))(*args))
    variables.pop("intermediates", None)
    rules = (*(jq.Rule(match=path, optional=True) for path in left), *recipe.rules)
    plan = jq.plan(model, variables, *args, recipe=jq.Recipe(name="r", rules=rules), **options)
    return variables, plan, jq.quantize(variables, plan)


def _packed(qvariables):
    """The same with two codes a byte, whose shape Flax would refuse."""
    packed = jq.Layout(packed=2)
    return jax.tree.map(
        lambda q: jq.relayout(q, packed) if isinstance(q, jq.QArray) else q,
        qvariables,
        is_leaf=lambda q: isinstance(q, jq.QArray),
    )


@every_case
def test_it_equals_the_plain_model_on_dequantized_weights(case):
    _, plan, qvariables = _quantized(case.model, *case.args, left=case.left, **case.options())
    with nn.intercept_methods(jq.interceptor(plan)):
        got = case.model.apply(qvariables, *case.args, **case.options())
    want = case.model.apply(dequantized(qvariables), *case.args, **case.options())
    assert_close(got, want, case.dtype)


@pytest.mark.parametrize("model", [InSetup(), Scanned(), Normed()], ids=lambda m: type(m).__name__)
def test_packed_codes_pass_flaxs_own_shape_check(model):
    _, plan, qvariables = _quantized(model, X, recipe=INT4)
    packed = _packed(qvariables)
    want = model.apply(dequantized(qvariables), X)
    with nn.intercept_methods(jq.interceptor(plan)):
        assert_close(model.apply(packed, X), want)
    assert_close(jq.wrap(model, plan).apply(packed, X), want)


def test_a_submodule_of_a_bound_model_can_be_called_alone():
    model = InSetup()
    _, plan, qvariables = _quantized(model, X, recipe=INT4)
    want = model.bind(dequantized(qvariables))
    for variables in (qvariables, _packed(qvariables)):
        with nn.intercept_methods(jq.interceptor(plan)):
            bound = model.bind(variables)
            assert_close(bound.up(X), want.up(X))
            assert_close(bound.encode(X), want.encode(X))
            assert_close(bound(X), want(X))


class Partly(nn.Module):
    """A model whose own code asks for the interceptor, around one submodule."""

    plan: jq.Plan | None = None

    def setup(self):
        self.before = nn.Dense(D)
        self.inner = Block()

    def __call__(self, x):
        x = self.before(x)
        if self.plan is None:
            return self.inner(x)[0]
        with nn.intercept_methods(jq.interceptor(self.plan)):
            return self.inner(x)[0]


def test_a_submodule_can_be_taken_over_inside_a_models_own_code():
    rules = (jq.Rule(match="before/*"), jq.Rule(match="*", weights=W8))
    recipe = jq.Recipe(name="partly", rules=rules)
    variables = Partly().init(jax.random.key(0), X)
    plan = jq.plan(Partly(), variables, X, recipe=recipe)
    qvariables = jq.quantize(variables, plan)
    got = jax.jit(Partly(plan=plan).apply)(qvariables, X)
    assert_close(got, Partly().apply(dequantized(qvariables), X))


class PartlyScanned(nn.Module):
    plan: jq.Plan | None = None

    @nn.compact
    def __call__(self, x):
        def body(block, x):
            if self.plan is None:
                return block(x)
            with nn.intercept_methods(jq.interceptor(self.plan)):
                return block(x)

        scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(Block(name="block"), x)[0]


def test_a_submodule_can_be_taken_over_inside_a_lifted_scan():
    variables = PartlyScanned().init(jax.random.key(0), X)
    plan = jq.plan(PartlyScanned(), variables, X, recipe=W8A16)
    qvariables = jq.quantize(variables, plan)
    got = jax.jit(PartlyScanned(plan=plan).apply)(qvariables, X)
    assert_close(got, PartlyScanned().apply(dequantized(qvariables), X))
    other = jq.plan(
        PartlyScanned(),
        variables,
        X,
        recipe=jq.Recipe(
            name="tensor",
            rules=(jq.Rule(match="*", weights=dataclasses.replace(W8, tile=jq.PER_TENSOR)),),
        ),
    )
    with pytest.raises(jq.PlanError, match="not what the plan"):
        PartlyScanned(plan=other).apply(qvariables, X)


def _recorder(calls, name):
    def record(next_fun, args, kwargs, context):
        calls.append(
            (name, type(context.module).__name__, context.module.path, context.method_name)
        )
        return next_fun(*args, **kwargs)

    return record


@pytest.mark.parametrize("model", [InSetup(), Scanned(), Sown()], ids=lambda m: type(m).__name__)
def test_other_interceptors_see_each_call_once_as_without_us(model):
    _, plan, qvariables = _quantized(model, X)

    def calls(variables, *interceptors):
        seen = []
        with nn.intercept_methods(_recorder(seen, "outer")):
            with nn.intercept_methods(interceptors[0]) if interceptors else _nothing():
                with nn.intercept_methods(_recorder(seen, "inner")):
                    jax.eval_shape(model.apply, variables, X)
        return seen

    want, got = calls(dequantized(qvariables)), calls(qvariables, jq.interceptor(plan))
    assert sorted(got) == sorted(want)
    assert len(set(got)) > 2


class _nothing:
    def __enter__(self):
        return None

    def __exit__(self, *_):
        return None


def test_two_plans_and_none_through_one_jitted_function():
    model = InSetup()
    variables, weight_only, a = _quantized(model, X, recipe=W8A16)
    _, rounded, b = _quantized(model, X, recipe=W8A8)
    assert weight_only.fingerprint != rounded.fingerprint
    f = jax.jit(model.apply)
    got = []
    for _ in range(2):
        with nn.intercept_methods(jq.interceptor(weight_only)):
            got.append(f(a, X))
        with nn.intercept_methods(jq.interceptor(rounded)):
            got.append(f(b, X))
        got.append(f(variables, X))
        with nn.intercept_methods(jq.interceptor(rounded)):
            np.testing.assert_array_equal(f(variables, X), got[-1])
            with pytest.raises(jq.PlanError, match="wrapped with the plan|quantized by the plan"):
                model.apply(a, X)
    want = [
        jax.jit(jq.wrap(model, weight_only).apply)(a, X),
        jax.jit(jq.wrap(model, rounded).apply)(b, X),
        model.apply(variables, X),
    ]
    for found, expected in zip(got, 2 * want, strict=True):
        assert_close(found, expected)
    assert jnp.abs(want[0] - want[1]).max() > 1e-3
    assert jnp.abs(want[0] - want[2]).max() > 1e-4


class Failing(nn.Module):
    fail: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(D)(x)
        if self.fail:
            raise ZeroDivisionError("on purpose")
        return x


def test_an_exception_inside_leaves_no_trace():
    _, plan, qvariables = _quantized(Failing(fail=False), X)
    seen = []
    with nn.intercept_methods(_recorder(seen, "outer")):
        with nn.intercept_methods(jq.interceptor(plan)):
            with nn.intercept_methods(_recorder(seen, "inner")):
                with pytest.raises(ZeroDivisionError):
                    Failing().apply(qvariables, X)
                seen.clear()
                got = Failing(fail=False).apply(qvariables, X)
    assert len(seen) == 4
    assert_close(got, Failing(fail=False).apply(dequantized(qvariables), X))


def test_another_quantized_model_may_be_called_inside():
    inner = Sown()
    _, inner_plan, inner_variables = _quantized(inner, X, recipe=W8A8)

    class Teacher(nn.Module):
        @nn.compact
        def __call__(self, x):
            with nn.intercept_methods(jq.interceptor(inner_plan)):
                return nn.Dense(D)(inner.apply(inner_variables, x)) + InSetup()(x)

    _, plan, qvariables = _quantized(Teacher(), X)
    with nn.intercept_methods(jq.interceptor(plan)):
        got = Teacher().apply(qvariables, X)
    assert_close(got, jq.wrap(Teacher(), plan).apply(qvariables, X))


def test_state_written_by_a_bound_model_is_seen_by_its_submodules():
    model = Normed()
    _, plan, qvariables = _quantized(model, X)
    plain = dequantized(qvariables)
    with nn.intercept_methods(jq.interceptor(plan)):
        bound = model.bind(qvariables, mutable=["batch_stats"])
        bound(X, train=True)
        got = bound.variables["batch_stats"]
    _, want = model.apply(plain, X, train=True, mutable=["batch_stats"])
    assert_close(jax.tree.map(lambda x: x, dict(got)), dict(want["batch_stats"]))
