import math

import hypothesis
import hypothesis.strategies as st
import pytest

from jaxquant.numerics import AbsMax, Convention, E4M3, INT4, INT8, MinMax
from jaxquant.qarray import PER_CHANNEL, PER_TENSOR, Scheme, Tile, tile_shape

PRINTED = {
    "int8 channel": Scheme(values=INT8, tile=PER_CHANNEL),
    "int8 tensor": Scheme(values=INT8, tile=PER_TENSOR),
    "int4 g64": Scheme(values=INT4, tile=Tile(contracted=64)),
    "int4+zero g64": Scheme(values=INT4, tile=Tile(contracted=64), range=MinMax(), zero_point=INT4),
    "e4m3 128x64": Scheme(values=E4M3, tile=Tile(contracted=128, kept=64)),
    "e4m3 1xall": Scheme(values=E4M3, tile=Tile(contracted=1, kept=None)),
}


@pytest.mark.parametrize("text", PRINTED)
def test_a_scheme_prints_in_a_few_words(text: str):
    assert str(PRINTED[text]) == text


# arguments -> what the refusal says.
MEANINGLESS = [
    (dict(values=INT8, scale=INT8), "Scales are held as FLOAT32, BFLOAT16 or FLOAT16, not as INT8"),
    (dict(values=INT8, scale=E4M3), "not as E4M3"),
    (dict(values=INT4, range=MinMax()), "Give both, or neither"),
    (dict(values=INT4, zero_point=INT4), "Give both, or neither"),
    (dict(values=INT8, range=MinMax(), zero_point=INT4), "at least as wide"),
    (dict(values=E4M3, range=MinMax(), zero_point=INT8), "must be integers"),
    (dict(values=INT4, range=MinMax(), zero_point=E4M3), "must be integers"),
    (
        dict(values=E4M3, range=AbsMax(convention=Convention.SIGNED)),
        "one convention, HIGHEST; got SIGNED",
    ),
]


@pytest.mark.parametrize("arguments, message", MEANINGLESS)
def test_a_combination_that_means_nothing_is_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Scheme(tile=PER_CHANNEL, **arguments)


@pytest.mark.parametrize("role", ["contracted", "kept"])
@pytest.mark.parametrize("size", [0, -1])
def test_a_tile_holds_something(role: str, size: int):
    with pytest.raises(ValueError, match=f"at least 1 element along its {role} axes, not {size}"):
        Tile(**{"contracted": 1, role: size})


# shape, tile, contracted, stack -> the tile of each axis.
BY_HAND = [
    ((64, 48), PER_CHANNEL, (0,), (), (64, 1)),
    ((64, 48), PER_CHANNEL, (1,), (), (1, 48)),
    ((64, 48), PER_TENSOR, (0,), (), (64, 48)),
    ((3, 64, 48), PER_TENSOR, (1,), (0,), (1, 64, 48)),
    ((64, 48), Tile(contracted=16), (0,), (), (16, 1)),
    ((64, 48), Tile(contracted=32, kept=24), (0,), (), (32, 24)),
    ((64, 48), Tile(contracted=None, kept=None), (), (), (64, 48)),
    # Several contracted axes: a tile is a run along their flattened product.
    ((4, 16, 8), Tile(contracted=8), (0, 1), (), (1, 8, 1)),
    ((4, 16, 8), Tile(contracted=32), (0, 1), (), (2, 16, 1)),
    ((4, 16, 8), Tile(contracted=64), (0, 1), (), (4, 16, 1)),
    ((4, 8, 16), Tile(contracted=32), (0, 2), (), (2, 1, 16)),
    ((4, 16, 8), Tile(contracted=4, kept=8), (0,), (), (4, 1, 8)),
    ((4, 2, 8), Tile(contracted=4, kept=16), (0,), (), (4, 2, 8)),
    ((5, 1, 8), PER_CHANNEL, (0, 1), (2,), (5, 1, 1)),
]


@pytest.mark.parametrize("shape, tile, contracted, stack, expected", BY_HAND)
def test_the_tile_of_each_axis_is_as_written_by_hand(shape, tile, contracted, stack, expected):
    assert tile_shape(shape, tile, contracted=contracted, stack=stack) == expected


RAGGED = [
    ((64, 48), Tile(contracted=24), (0,), "Tiles of 24 do not fill the contracted axes .0,."),
    ((64, 48), Tile(contracted=128), (0,), "Tiles of 128 do not fill"),
    ((64, 48), Tile(contracted=None, kept=32), (0,), "fill the kept axes .1,.*48 elements"),
    ((4, 6), Tile(contracted=4), (0, 1), "Use a divisor of 24 that splits no axis raggedly"),
    ((4, 6), Tile(contracted=9), (0, 1), "Use a divisor of 24"),
]


@pytest.mark.parametrize("shape, tile, contracted, message", RAGGED)
def test_tiles_that_do_not_fill_an_axis_are_refused(shape, tile, contracted, message):
    with pytest.raises(ValueError, match=message):
        tile_shape(shape, tile, contracted=contracted)


@hypothesis.given(
    shape=st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 12]), min_size=1, max_size=4).map(tuple),
    size=st.sampled_from([None, 1, 2, 3, 4, 6, 8, 16, 24]),
    data=st.data(),
)
def test_a_tile_is_a_run_of_neighbours_along_the_flattened_contracted_axes(shape, size, data):
    contracted = tuple(data.draw(st.sets(st.sampled_from(range(len(shape))))))
    total = math.prod(shape[a] for a in contracted)
    try:
        tile = tile_shape(shape, Tile(contracted=size), contracted=contracted)
    except ValueError:
        # Nothing that divides the last axis, or is made of whole last axes, may be refused.
        assert size is not None and not _is_a_run([shape[a] for a in sorted(contracted)], size)
        return
    assert all(n % t == 0 for n, t in zip(shape, tile, strict=True))
    assert all(t == 1 for a, t in enumerate(tile) if a not in contracted)
    assert math.prod(tile) == (total if size is None else size)
    runs = [(shape[a], tile[a]) for a in sorted(contracted)]
    whole = [t == n for n, t in runs]
    # From the last axis: whole axes, then at most one in part, then 1.
    for i, (_, t) in enumerate(runs):
        assert t == 1 or all(whole[i + 1 :])


def _is_a_run(shape: list[int], size: int) -> bool:
    for n in reversed(shape):
        if size <= n:
            return n % size == 0
        if size % n:
            return False
        size //= n
    return size == 1
