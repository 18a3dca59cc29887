"""Trees of variables: which leaves are parameters, what they are called, what lies beside them."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import assert_close, inputs, W8A16, weight, wrapped
from flax import linen as nn, nnx
from flax.core import freeze

import jaxquant as jq
from jaxquant.intercept import leaf_paths, map_leaves, PlanStamp, stamped
from jaxquant.intercept._variables import parameters, unstamped

K = 8
X = inputs(4, K)


class EmptyState(typing.NamedTuple):
    """A pytree without leaves, as optax has them."""


class Strange(nn.Module):
    """Names with slashes, nested dictionaries, and collections of every name."""

    @nn.compact
    def __call__(self, x):
        w = self.param("a/b", nn.initializers.zeros, (K, K))
        tree = self.param("tree", lambda key: {"x": {"w": jnp.zeros((K, K))}})
        shift = self.variable("constants", "shift", jnp.zeros, (1, K))
        return x @ w @ tree["x"]["w"] + shift.value


def _variables():
    w, v = weight(K, K), weight(K, K, seed=4)
    return {
        "params": {"a/b": w, "tree": {"x": {"w": v}}},
        "constants": {"shift": jnp.ones((1, K))},
        "keys": {"key": jax.random.key(0)},
        "optimizer": {"state": (EmptyState(), None, {"count": 3})},
    }


def test_paths_leave_out_the_collection_of_parameters_alone():
    assert leaf_paths({"params": {"a": {"b": X}}, "cache": {"a": X}}) == [None, "a/b"]


def test_strange_trees_pass_through_plan_quantize_and_apply():
    variables = _variables()
    plan = jq.plan(Strange(), variables, X, recipe=W8A16)
    assert [leaf.path for leaf in plan.leaves] == ["a/b", "tree/x/w"]
    qvariables = jq.quantize(variables, plan)
    assert qvariables["optimizer"] == {"state": (EmptyState(), None, {"count": 3})}
    want = Strange().apply(variables, X)
    np.testing.assert_array_equal(wrapped(Strange(), plan).apply(qvariables, X), want)
    with nn.intercept_methods(jq.interceptor(plan, backend="xla")):
        np.testing.assert_array_equal(Strange().apply(qvariables, X), want)


def test_two_parameters_of_one_name_are_refused():
    variables = {"params": {"a/b": X, "a": {"b": X}}}
    with pytest.raises(ValueError, match="Two parameters are called 'a/b'"):
        parameters(variables)


def test_one_array_under_two_names_is_two_parameters():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            a, b = (self.param(name, nn.initializers.zeros, (K, K)) for name in "ab")
            return x @ a @ b

    w = weight(K, K)
    variables = {"params": {"a": w, "b": w}}
    plan = jq.plan(Two(), variables, X, recipe=W8A16)
    assert [leaf.path for leaf in plan.leaves] == ["a", "b"]
    got = wrapped(Two(), plan).apply(jq.quantize(variables, plan), X)
    np.testing.assert_array_equal(got, X @ w @ w)


def test_frozen_dictionaries_are_as_good():
    model = nn.Dense(K)
    variables = freeze(model.init(jax.random.key(0), X))
    plan = jq.plan(model, variables, X, recipe=W8A16)
    qvariables = jq.quantize(variables, plan)
    want = jq.dequantize(qvariables["params"]["kernel"])
    assert_close(jq.wrap(model, plan).apply(freeze(qvariables), X), X @ want)


def test_boxes_of_metadata_stay_around_qarrays():
    model = nn.Dense(
        K, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    )
    variables = model.init(jax.random.key(0), X)
    plan = jq.plan(model, variables, X, recipe=W8A16)
    assert [leaf.path for leaf in plan.leaves] == ["kernel"]
    qvariables = jq.quantize(variables, plan)
    box = qvariables["params"]["kernel"]
    assert isinstance(box, nn.Partitioned) and isinstance(box.value, jq.QArray)
    assert box.names == ("in", "out")
    want = X @ jq.dequantize(box.value)
    assert_close(jq.wrap(model, plan).apply(qvariables, X), want)
    with nn.intercept_methods(jq.interceptor(plan)):
        assert_close(model.apply(qvariables, X), want)


def test_metadata_of_nnx_parameters_stays():
    model = nnx.Linear(
        K,
        K,
        rngs=nnx.Rngs(0),
        kernel_init=nnx.with_metadata(nnx.initializers.lecun_normal(), note="kept"),
    )
    plan = jq.plan(model, nnx.state(model), X, recipe=W8A16)
    qvariables = jq.quantize(nnx.state(model), plan)
    kernel = dict(qvariables)["kernel"]
    assert kernel.note == "kept" and isinstance(kernel.get_value(), jq.QArray)


def test_map_leaves_takes_a_qarray_for_one_leaf():
    q = jq.quantize_array(weight(K, K), jq.Scheme(values=jq.INT8, tile=jq.PER_CHANNEL))
    seen = []
    map_leaves(lambda path, leaf: seen.append((path, type(leaf).__name__)), {"params": {"w": q}})
    assert seen == [("w", "QArray")]


@pytest.mark.parametrize("tree", [{"params": {"w": X}}, nnx.State({"w": nnx.Param(X)})], ids=type)
def test_stamps_come_off_as_they_went_on(tree):
    plain, fingerprint = unstamped(stamped(tree, "abc"))
    assert fingerprint == "abc" and jax.tree.structure(plain) == jax.tree.structure(tree)
    assert unstamped(tree)[1] is None


def test_trees_of_two_plans_differ_in_structure():
    a, b = (stamped({"params": {"w": X}}, name) for name in "ab")
    assert jax.tree.structure(a) != jax.tree.structure(b)
    assert jax.tree.leaves(PlanStamp("a")) == []
