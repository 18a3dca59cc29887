"""Weights on their way through a model, and the roles of their axes."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxquant.intercept._weight import is_weight, roles, same_view, Weight, whole


def _weight(axes, stored=(2, 3, 4)):
    shape = [1 if not a else stored[a[0]] for a in axes]
    return Weight(value=jnp.zeros(shape), path="w", axes=axes, stored=stored)


@pytest.mark.parametrize(
    "axes, contracted, batch, expected",
    [
        (((0,), (1,), (2,)), (1,), (0,), ("batch", "contracted", "kept")),
        (((2,), (0,)), (0,), (), ("kept", "stack", "contracted")),
        (((), (0, 1), (2,)), (1,), (), ("contracted", "contracted", "kept")),
        (((1,), (1,)), (), (), ("stack", "kept", "stack")),
    ],
)
def test_roles_are_carried_back_to_the_stored_axes(axes, contracted, batch, expected):
    assert roles(_weight(axes), contracted, batch) == expected


def test_an_axis_that_plays_two_roles_has_none():
    assert "axis 1 of the parameter is split into" in roles(_weight(((1,), (1,))), (0,), ())


def test_a_whole_parameter_has_its_own_axes():
    w = whole(jnp.zeros((2, 3)), "w")
    assert (w.axes, w.stored, w.shape, w.via) == (((0,), (1,)), (2, 3), (2, 3), None)


def test_the_same_view_is_of_the_same_axes_as_a_whole():
    w = whole(jnp.zeros((3, 3)), "w")
    assert same_view(w, w.view(w.value + 1, w.axes))
    assert not same_view(w, w.view(w.value, w.axes[::-1]))
    assert not same_view(w, w.view(w.value[:2], w.axes))
    assert not same_view(w, w.value) and not same_view(w, whole(w.value, "v"))


def test_weights_are_pytrees_of_their_arrays():
    w = whole(jnp.zeros((2, 3)), "w")
    (leaf,), tree = jax.tree.flatten(w)
    assert leaf.shape == (2, 3) and is_weight(jax.tree.unflatten(tree, [leaf]))


def test_shards_are_those_of_the_stored_axes():
    w = whole(jnp.zeros((2, 3)), "w")
    assert w.shards_of(0) == ()
    cut = dataclasses.replace(w, shards=(("a", "b"), ()))
    assert cut.view(w.value.T, w.axes[::-1]).shards_of(1) == ("a", "b")
