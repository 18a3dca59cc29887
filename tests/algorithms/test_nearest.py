"""Rounding to nearest, leaf by leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

import jaxquant as jq
from jaxquant.algorithms import nearest
from jaxquant.checkpoint import LazyArray
from jaxquant.intercept._variables import parameters

INT8 = jq.Scheme(values=jq.INT8, tile=jq.PER_CHANNEL)
RECIPE = jq.Recipe(name="all", rules=(jq.Rule(match="*", weights=INT8),))
X = jnp.ones((2, 16))


class TwoLayers(nnx.Module):
    def __init__(self):
        self.first = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
        self.second = nnx.Linear(8, 4, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


def _planned():
    model = nn.Dense(8)
    variables = model.init(jax.random.key(0), X)
    return variables, jq.plan(model, variables, X, recipe=RECIPE)


def test_compiled_rounding_gives_the_codes_of_rounding_by_hand():
    w = jax.random.normal(jax.random.key(0), (16, 8))
    compiled, by_hand = nearest(w, INT8, (16, 1)), jq.quantize_array(w, INT8, contracted=(0,))
    np.testing.assert_array_equal(compiled.codes, by_hand.codes)
    np.testing.assert_array_equal(compiled.scale, by_hand.scale)


def test_planned_parameters_become_qarrays_and_others_stay_what_they_are():
    variables, plan = _planned()
    quantized = parameters(jq.quantize(variables, plan))
    assert isinstance(quantized["kernel"], jq.QArray)
    assert quantized["bias"] is variables["params"]["bias"]


def test_the_tree_differs_from_one_quantized_by_another_plan_in_its_static_part():
    variables, plan = _planned()
    rules = (jq.Rule(match="*", weights=INT8, activations=INT8),)
    other = jq.plan(nn.Dense(8), variables, X, recipe=jq.Recipe(name="w8a8", rules=rules))
    first, second = jq.quantize(variables, plan), jq.quantize(variables, other)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), first["params"], second["params"])
    assert all(jax.tree.leaves(same))
    assert jax.tree.structure(first) != jax.tree.structure(second)


def test_leaves_in_files_are_read_one_at_a_time_in_nnx_states_too():
    model = TwoLayers()
    state = nnx.state(model)
    reads = []

    def lazy(path, x):
        def load():
            reads.append(path)
            return np.asarray(x)

        return LazyArray(shape=x.shape, dtype=np.dtype(x.dtype), load=load, name=path)

    from jaxquant.intercept import map_leaves

    files = map_leaves(lazy, state)
    plan = jq.plan(model, state, X, recipe=RECIPE)
    done = []
    quantized = jq.quantize(files, plan, progress=done.append)
    assert reads == ["first/bias", "first/kernel", "second/bias", "second/kernel"]
    assert done == ["first/kernel", "second/kernel"]
    expected = jq.quantize(state, plan)
    for ours, theirs in zip(jax.tree.leaves(quantized), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named(bad):
    variables, plan = _planned()
    kernel = variables["params"]["kernel"].at[3, 5].set(bad)
    with pytest.raises(ValueError, match="kernel holds NaN or infinity"):
        jq.quantize({"params": {**variables["params"], "kernel": kernel}}, plan)


def test_a_parameter_of_another_shape_than_planned_is_named():
    variables, plan = _planned()
    kernel = variables["params"]["kernel"][:8]
    with pytest.raises(ValueError, match=r"kernel has shape \(8, 8\).*planned|made for"):
        jq.quantize({"params": {**variables["params"], "kernel": kernel}}, plan)


def test_a_planned_parameter_that_is_missing_is_named():
    variables, plan = _planned()
    with pytest.raises(ValueError, match="quantizes kernel, which is not among the 1 parameters"):
        jq.quantize({"params": {"bias": variables["params"]["bias"]}}, plan)


def test_shapes_alone_are_refused():
    variables, plan = _planned()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    with pytest.raises((ValueError, TypeError)):
        jq.quantize(shapes, plan)
