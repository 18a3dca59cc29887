"""Runs of columns."""

import numpy as np
import pytest

from jaxquant.algorithms._panels import LEAF, panels


@pytest.mark.parametrize("block", [1, 7, 16, 128])
@pytest.mark.parametrize(
    ("columns", "width"),
    [(1, 1), (48, 48), (64, 16), (576, 64), (100, 28), (1536, 1536), (640, 192)],
)
def test_every_column_has_one_slot_and_runs_divide_each_other(columns, width, block):
    made = panels(columns, width, block)
    places = made.places()
    np.testing.assert_array_equal(np.sort(places[places >= 0]), np.arange(columns))
    assert len(places) == made.slots
    sizes = (made.slots, *made.sizes)
    assert all(outer % inner == 0 for outer, inner in zip(sizes, sizes[1:], strict=False))
    assert made.sizes[-1] <= LEAF
    # No run crosses from one group to the next, unless it holds whole ones.
    assert all(made.group % size == 0 or size % made.group == 0 for size in made.sizes)
    for group in range(made.groups):
        own = places[group * made.group : (group + 1) * made.group]
        first = group * width
        wanted = np.arange(first, min(first + width, columns))
        np.testing.assert_array_equal(own[: len(wanted)], wanted)
        assert (own[len(wanted) :] == -1).all()


@pytest.mark.parametrize(("columns", "width"), [(576, 64), (1536, 64), (2048, 2048), (576, 192)])
def test_usual_shapes_leave_no_slot_empty(columns, width):
    assert panels(columns, width, 128).slots == columns
