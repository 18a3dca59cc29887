"""Roles are read at the op and carried back to the stored axes."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxquant.intercept._weight import is_weight, roles, same_view, whole

W = whole(jnp.zeros((3, 4, 5)), "w")


@pytest.mark.parametrize(
    "axes, contracted, batch, expected",
    [
        (((0,), (1,), (2,)), (1,), (0,), ("batch", "contracted", "kept")),
        (((2,), (1,)), (1,), (), ("stack", "contracted", "kept")),
        (((0, 1), (2,)), (0,), (), ("contracted", "contracted", "kept")),
        (((), (0,), (1,), (2,)), (0, 3), (), ("kept", "kept", "contracted")),
        (((1,), (1,), (2,)), (0, 1), (), ("stack", "contracted", "kept")),
    ],
)
def test_roles_follow_the_axes(axes, contracted, batch, expected):
    assert roles(dataclasses.replace(W, axes=axes), contracted, batch) == expected


def test_an_axis_that_is_split_into_two_roles_has_none():
    split = dataclasses.replace(W, axes=((0,), (1,), (1,), (2,)))
    assert roles(split, (2,), ()) == "axis 1 of the parameter is split into kept and contracted"


def test_a_weight_is_a_pytree_whose_provenance_is_static():
    leaves, tree = jax.tree.flatten(W)
    again = jax.tree.unflatten(tree, leaves)
    assert len(leaves) == 1 and is_weight(again)
    assert (again.path, again.axes, again.stored) == (W.path, W.axes, W.stored)


def test_two_views_are_the_same_only_if_nothing_of_them_differs():
    assert same_view(W, whole(jnp.ones((3, 4, 5)), "w"))
    assert not same_view(W, whole(jnp.zeros((3, 4, 5)), "v"))
    assert not same_view(W, dataclasses.replace(W, axes=((1,), (0,), (2,))))
    assert not same_view(W, dataclasses.replace(W, scans=((0,),)))
    derived = dataclasses.replace(W, via="tanh")
    assert not same_view(derived, derived)
    assert not same_view(W, W.value)
