"""Roles of a weight's axes at each kind of site; that they are computed by: test_compute.py."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxquant.intercept._roles import ragged_axes, site_roles
from jaxquant.intercept._weight import whole

SIZES = jnp.asarray([2, 1, 3], jnp.int32)


def _equation(function, *shapes):
    """The only equation of a function of arrays."""
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    (eqn,) = jax.make_jaxpr(function)(*structs).eqns
    return eqn


def _weight(*shape):
    return whole(jnp.zeros(shape), "w")


def test_what_is_no_view_of_a_parameter_has_no_roles():
    eqn = _equation(jnp.dot, (2, 3), (3, 4))
    derived = dataclasses.replace(_weight(3, 4), via="exp")
    assert site_roles(derived, eqn, "dot", 1) == "it reads w only through `exp`"
    assert site_roles(_weight(3, 4), eqn, "dot", 1) == ("contracted", "kept")


def _gather(table, indices):
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0,)
    )
    return lax.gather(table, indices.astype(jnp.int32), numbers, (1, 4))


def test_a_table_is_looked_up_by_row():
    jaxpr = jax.make_jaxpr(_gather)(jnp.zeros((5, 4)), jnp.zeros((2, 1)))
    eqn = jaxpr.eqns[-1]
    assert site_roles(_weight(5, 4), eqn, "take", 0) == ("kept", "contracted")
    assert "used as positions" in site_roles(_weight(2, 1), eqn, "take", 1)


NUMBERS = {
    ("NHWC", "HWIO", "NHWC"): ("contracted",) * 3 + ("kept",),
    ("NCHW", "OIHW", "NCHW"): ("kept",) + ("contracted",) * 3,
    ("NHWC", "HOWI", "NHWC"): ("contracted", "kept", "contracted", "contracted"),
}


@pytest.mark.parametrize("numbers, expected", NUMBERS.items())
def test_a_kernel_keeps_its_output_features(numbers, expected):
    def function(x, w):
        return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)

    eqn = _equation(function, (4, 4, 4, 4), (4, 4, 4, 4))
    assert site_roles(_weight(4, 4, 4, 4), eqn, "conv", 1) == expected
    assert "what is convolved" in site_roles(_weight(4, 4, 4, 4), eqn, "conv", 0)


@pytest.mark.parametrize(
    "groups, expected",
    [(3, "stack"), (6, "stack"), (1, "kept"), (2, "kept")],
)
def test_axes_in_front_of_the_outputs_are_stacks_if_each_is_a_group(groups, expected):
    def function(x, w):
        return lax.conv_general_dilated(
            x,
            w,
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=groups,
        )

    eqn = _equation(function, (1, 5, 4 * groups), (2, 4, 12))
    w = _weight(3, 2, 4, 4).view(jnp.zeros((2, 4, 12)), ((1,), (2,), (0, 3)))
    assert site_roles(w, eqn, "conv", 1) == (expected, "contracted", "contracted", "kept")


def _ragged(x, w, *, left=1, right=1, rows=0, experts=0, **keywords):
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((left,), (right,)), ((), ())),
        lhs_ragged_dimensions=(rows,),
        rhs_group_dimensions=() if experts is None else (experts,),
    )
    return lax.ragged_dot_general(x, w, SIZES, numbers, **keywords)


def test_experts_are_a_batch_of_matrices():
    eqn = _equation(_ragged, (6, 4), (3, 4, 5))
    assert ragged_axes(eqn) == ((0, 1), (0, 1, 2))
    assert site_roles(_weight(3, 4, 5), eqn, "ragged_dot", 1) == ("batch", "contracted", "kept")
    assert "dealt out to experts" in site_roles(_weight(6, 4), eqn, "ragged_dot", 0)
    assert "as group sizes" in site_roles(_weight(3), eqn, "ragged_dot", 2)


def test_the_axes_of_a_ragged_product_may_stand_in_any_order():
    eqn = _equation(lambda x, w: _ragged(x, w, right=2, experts=1), (6, 4), (5, 3, 4))
    assert ragged_axes(eqn) == ((0, 1), (1, 2, 0))
    assert site_roles(_weight(5, 3, 4), eqn, "ragged_dot", 1) == ("kept", "batch", "contracted")
    eqn = _equation(lambda x, w: _ragged(x, w, left=0, rows=1), (4, 6), (3, 4, 5))
    assert ragged_axes(eqn) == ((1, 0), (0, 1, 2))


def test_what_ragged_dot_itself_does_not_compute_is_refused():
    eqn = _equation(lambda x, w: _ragged(x, w, left=0, right=0, experts=None), (6, 4), (6, 5))
    assert "rows by experts only" in ragged_axes(eqn)
    eqn = _equation(_ragged, (6, 4), (3, 4, 5))
    # JAX cannot trace an offset yet: it is a parameter, and arrays have no hash.
    shifted = types.SimpleNamespace(params={**eqn.params, "group_offset": 1}, invars=eqn.invars)
    assert "group offset" in ragged_axes(shifted)
