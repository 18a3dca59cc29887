"""Trees of variables as plain data, and back: exact structures, and types from a list only."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx
from flax.core import freeze
from jax.sharding import PartitionSpec
from quantized_trees import assert_same, linen_tree, nnx_tree

from jaxquant.checkpoint import _tree, CheckpointError
from jaxquant.intercept import PlanStamp
from jaxquant.intercept._variables import named_leaves


class Own(nnx.Variable):
    """A type of Variable that Flax does not have."""


def boxed():
    box = nn.LogicallyPartitioned(jnp.ones((2, 3)), names=("in", None))
    return {"params": {"a": {"kernel": box}, "b": nn.Partitioned(jnp.ones(2), names=("x",))}}


TREES = {
    "linen": lambda: linen_tree()[0],
    "nnx": lambda: nnx_tree()[0],
    "boxes": boxed,
    "frozen": lambda: freeze({"params": {"a": jnp.ones(2)}}),
    "stamp in a state": lambda: nnx.State({"a": {"b": PlanStamp("f")}}),
    "spec": lambda: nnx.State({"a": nnx.Param(jnp.ones(2), spec=PartitionSpec("x", None))}),
    "metadata": lambda: nnx.State({"a": nnx.Param(jnp.ones(2), d={"a": [1, (2.5, None)]})}),
}


def through_json(tree, fingerprint="f"):
    described, leaves = _tree.describe(tree)
    described = json.loads(json.dumps(described))
    return _tree.build(described, {i: x.value for i, x in enumerate(leaves)}, fingerprint)


@pytest.mark.parametrize("name", TREES)
def test_a_tree_comes_back_with_the_same_structure(name):
    tree = TREES[name]()
    if name in ("linen", "nnx"):
        fingerprint = (linen_tree if name == "linen" else nnx_tree)()[1].fingerprint
    else:
        fingerprint = "f"
    assert_same(through_json(tree, fingerprint), tree)


@pytest.mark.parametrize("name", ["linen", "nnx", "boxes"])
def test_paths_are_those_of_plans(name):
    tree = TREES[name]()
    ours = {(leaf.path, leaf.parameter) for leaf in _tree.describe(tree)[1]}
    assert ours == {(path, parameter) for path, parameter, _ in named_leaves(tree)}


def test_lazily_loaded_arrays_are_leaves():
    class Lazy:
        shape, dtype = (2,), np.dtype(np.float32)

        def __array__(self, dtype=None, copy=None):
            raise AssertionError("it was read")

    assert _tree.describe({"params": {"a": Lazy()}})[1][0].path == "a"


@pytest.mark.parametrize("thing", [3, "text", jax.ShapeDtypeStruct((2,), jnp.float32), object()])
def test_what_is_no_array_is_refused_by_its_path(thing):
    with pytest.raises(TypeError, match=f"a/b is a {type(thing).__name__}"):
        _tree.describe({"params": {"a": {"b": thing}}})


def test_keys_that_json_has_not_are_refused():
    with pytest.raises(TypeError, match=r"params has the key \(1, 2\)"):
        _tree.describe({"params": {(1, 2): jnp.ones(2)}})


UNKNOWN = {
    "a type of its own": (lambda: Own(jnp.ones(2)), "Own, and its type"),
    "a function as metadata": (
        lambda: nnx.Param(jnp.ones(2), initializer=jnp.ones),
        r"flax.nnx.Param, and its metadata \['initializer'\]",
    ),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_only_code_can_make_needs_a_template(case):
    make, words = UNKNOWN[case]
    tree = nnx.State({"a": make()})
    with pytest.raises(CheckpointError, match=f"{words} cannot be read from a file. .*template="):
        through_json(tree)
    described, leaves = _tree.describe(tree)
    named = [(leaf.path, leaf.parameter, 2 * leaf.value) for leaf in leaves]
    filled = _tree.fill(tree, described, named, "f")
    assert type(dict(filled)["a"]) is type(dict(tree)["a"])
    assert np.array_equal(dict(filled)["a"].get_value(), [2, 2])


def test_a_box_with_a_mesh_needs_a_template():
    box = nn.Partitioned(jnp.ones(2), names=("x",), mesh=jax.make_mesh((1,), ("x",)))
    with pytest.raises(CheckpointError, match=r"Partitioned, and its metadata \['mesh'\]"):
        through_json({"params": {"a": box}})


@pytest.mark.parametrize("make", [linen_tree, nnx_tree])
def test_a_template_is_filled_by_path(make):
    tree, plan = make()
    described, leaves = _tree.describe(tree)
    named = [(leaf.path, leaf.parameter, leaf.value) for leaf in leaves]
    assert_same(_tree.fill(tree, described, named, plan.fingerprint), tree)


MISFITS = {
    "more": ({"a": jnp.ones(2), "b": jnp.ones(2)}, "the template has b and the checkpoint"),
    "less": ({}, "the checkpoint has a and the template does not"),
    "shape": ({"a": jnp.ones(3)}, r"a has shape \(3,\) in the template and \(2,\)"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_template_that_does_not_fit_is_refused_by_path(case):
    params, words = MISFITS[case]
    described, leaves = _tree.describe({"params": {"a": jnp.ones(2)}})
    named = [(leaf.path, leaf.parameter, leaf.value) for leaf in leaves]
    with pytest.raises(CheckpointError, match=words):
        _tree.fill({"params": params}, described, named, "f")


def test_nodes_and_types_that_are_not_on_the_list_are_refused():
    for node in (
        {"run": "os.system"},
        {"variable": "os.system", "metadata": [], "lost": [], "of": {}},
    ):
        with pytest.raises(CheckpointError):
            _tree.build(node, {}, "f")
