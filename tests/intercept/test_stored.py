import dataclasses

import numpy as np
import pytest

from jaxquant.intercept._channels import Book
from jaxquant.intercept._mark import Root
from jaxquant.intercept._stored import Stored, stored_axes
from jaxquant.intercept._weight import Weight

# Stored `[experts, heads, width, head_dim]`, seen as `[width, experts, heads * head_dim]`.
STORED = Stored(
    shape=(3, 2, 5, 4),
    roles=("batch", "kept", "contracted", "kept"),
    groups=((2,), (0,), (1, 3)),
)


def test_channels_go_to_the_stored_order_and_back():
    whole = np.arange(120, dtype=np.int32).reshape(5, 3, 8)
    for axes in [(0,), (1,), (2,), (0, 2), (0, 1, 2)]:
        cut = tuple(slice(None) if a in axes else slice(1) for a in range(3))
        present = whole[cut]
        stored = STORED.from_present(present)
        wanted = np.broadcast_to(present, (5, 3, 8)).reshape(5, 3, 2, 4).transpose(1, 2, 0, 3)
        np.testing.assert_array_equal(np.broadcast_to(stored, (3, 2, 5, 4)), wanted)
        np.testing.assert_array_equal(STORED.to_present(stored), present)


def test_matrix_form_has_the_stack_only_if_it_matters():
    columns = np.arange(5, dtype=np.int32).reshape(1, 1, 5, 1)
    np.testing.assert_array_equal(STORED.matrix(columns), np.arange(5))
    each = np.arange(15, dtype=np.int32).reshape(3, 1, 5, 1)
    np.testing.assert_array_equal(STORED.matrix(each), np.arange(15).reshape(3, 5))
    # Two contracted axes make one, in stored order.
    both = dataclasses.replace(STORED, roles=("batch", "contracted", "contracted", "kept"))
    np.testing.assert_array_equal(both.matrix(columns), [*range(5), *range(5)])


@pytest.mark.parametrize(
    "op, shape", [("dot", (3, 2, 1, 4)), ("ragged_dot", (1, 2, 1, 4)), ("take", (1, 1, 5, 1))]
)
def test_each_column_gets_a_channel(op, shape):
    stored, present = STORED.new(Book(), op, -1)
    assert stored.shape == shape
    np.testing.assert_array_equal(present, STORED.to_present(stored))


def weight(value_shape, axes):
    value = np.zeros(value_shape, np.float32)
    return Weight(value=value, path="w", stored=(6, 5, 1, 4), axes=axes)


ROLES = ("stack", "contracted", "kept", "kept")


def test_slices_that_a_loop_takes_are_left_out():
    found = stored_axes(weight((4, 5), ((3,), (1,))), Root(path="w", steps=((0, 2),)), ROLES)
    assert found is not None and found.shape == (5, 1, 4)
    assert found.groups == ((2,), (0,)) and found.roles == ROLES[1:]


@pytest.mark.parametrize(
    "shape, axes, steps",
    [
        ((4, 3), ((3,), (1,)), ((0, 2),)),  # Three of five columns.
        ((4, 5), ((3,), (1,)), ()),  # One of six, chosen otherwise than by a loop.
    ],
)
def test_parts_of_a_parameter_are_not_followed(shape, axes, steps):
    assert stored_axes(weight(shape, axes), Root(path="w", steps=steps), ROLES) is None
