import itertools

import pytest

from jaxquant.qarray import CANONICAL, Layout
from jaxquant.qarray._layout import inverse, order_of


@pytest.mark.parametrize("ndim", [0, 1, 3, 5])
def test_the_canonical_layout_stores_every_axis_where_it_stands(ndim: int):
    assert CANONICAL.permutation(ndim) == tuple(range(ndim))


def test_an_order_counts_from_the_end_and_leaves_axes_in_front_alone():
    layout = Layout(order=(-1, -3, -2))
    assert layout.permutation(3) == (2, 0, 1)
    assert layout.permutation(5) == (0, 1, 4, 2, 3)


def test_an_order_of_more_axes_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"order \(-1, -2\) needs at least 2 axes.*have 1"):
        Layout(order=(-1, -2)).permutation(1)


def test_codes_are_packed_or_wide_and_not_both():
    with pytest.raises(ValueError, match="packed.*wide.*not both"):
        Layout(packed=2, wide=True)


@pytest.mark.parametrize("permutation", list(itertools.permutations(range(4))))
def test_the_shortest_order_gives_the_permutation_back(permutation: tuple[int, ...]):
    order = order_of(permutation)
    assert Layout(order=order).permutation(4) == permutation
    # One more stacked axis in front changes nothing, and one fewer could not be told apart.
    assert Layout(order=order).permutation(5) == (0, *(a + 1 for a in permutation))
    assert order is None or order[0] != -len(order)


@pytest.mark.parametrize("permutation", list(itertools.permutations(range(4))))
def test_an_inverse_undoes(permutation: tuple[int, ...]):
    assert tuple(inverse(permutation)[a] for a in permutation) == (0, 1, 2, 3)
    assert inverse(inverse(permutation)) == permutation
