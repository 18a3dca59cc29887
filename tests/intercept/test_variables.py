"""Paths, parameters and stamps of Linen's dictionaries and NNX's states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx
from flax.core import freeze

import jaxquant as jq
from jaxquant.intercept import leaf_paths, map_leaves, PlanStamp, stamped
from jaxquant.intercept._variables import named_leaves, parameters, unstamped

Q = jq.quantize_array(jnp.ones((4, 2)), jq.Scheme(values=jq.INT8, tile=jq.PER_CHANNEL))
LINEN = {
    "batch_stats": {"mean": jnp.zeros(2)},
    "params": {"dense": {"kernel": Q, "bias": nn.Partitioned(jnp.zeros(2), names=("n",))}},
}


class Model(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([nnx.Linear(4, 2, rngs=nnx.Rngs(0))])
        self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(1))


@pytest.mark.parametrize("variables", [LINEN, freeze(LINEN)], ids=["dict", "FrozenDict"])
def test_parameters_of_linen_are_those_in_params_and_boxes_have_no_name(variables):
    assert leaf_paths(variables) == [None, "dense/bias", "dense/kernel"]
    assert [path for path, _, _ in named_leaves(variables)][0] == "batch_stats/mean"


def test_parameters_of_nnx_are_its_params():
    state = nnx.state(Model())
    assert set(parameters(state)) == {
        "layers/0/kernel",
        "layers/0/bias",
        "norm/scale",
        "norm/bias",
    }
    assert leaf_paths(state).count(None) == 2


def test_paths_stand_in_the_order_of_leaves():
    leaves = jax.tree.leaves(LINEN, is_leaf=lambda x: isinstance(x, jq.QArray))
    for (_, _, named), leaf in zip(named_leaves(LINEN), leaves, strict=True):
        assert named is leaf


def test_mapping_keeps_everything_around_the_leaves():
    mapped = map_leaves(
        lambda path, x: (
            x if path is None else jq.dequantize(x) if isinstance(x, jq.QArray) else x + 1
        ),
        LINEN,
    )
    box = mapped["params"]["dense"]["bias"]
    assert isinstance(box, nn.Partitioned) and box.names == ("n",)
    np.testing.assert_array_equal(box.value, jnp.ones(2))
    np.testing.assert_array_equal(mapped["params"]["dense"]["kernel"], jq.dequantize(Q))


@pytest.mark.parametrize("variables", [LINEN, nnx.state(Model())], ids=["linen", "nnx"])
def test_a_stamp_is_a_part_of_the_structure_and_comes_off_again(variables):
    first, second = stamped(variables, "a"), stamped(variables, "b")
    assert jax.tree.structure(first) != jax.tree.structure(second)
    assert len(jax.tree.leaves(first)) == len(jax.tree.leaves(variables))
    own, fingerprint = unstamped(first)
    assert fingerprint == "a"
    assert jax.tree.structure(own) == jax.tree.structure(variables)
    assert unstamped(variables) == (variables, None)


def test_a_stamp_has_no_leaves():
    assert jax.tree.leaves(PlanStamp("a")) == []


def test_two_parameters_of_one_path_are_an_error():
    variables = {"params": {"a": {"b": jnp.zeros(1)}, "a/b": jnp.zeros(1)}}
    with pytest.raises(ValueError, match="Two parameters are called 'a/b'"):
        parameters(variables)
