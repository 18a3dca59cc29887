import math

import hypothesis
import hypothesis.strategies as st
import pytest

from jaxquant.numerics import (
    AbsMax,
    Convention,
    E4M3,
    E8M0,
    FLOAT16,
    INT4,
    INT8,
    MinMax,
    NF4,
    Percentile,
    SharedExponent,
    UINT4,
)
from jaxquant.qarray import PER_CHANNEL, PER_TENSOR, Scheme, schemes, Tile, tile_shape

PRINTED = {
    "int8 channel": Scheme(values=INT8, tile=PER_CHANNEL),
    "int8 tensor": Scheme(values=INT8, tile=PER_TENSOR),
    "int4 g64": Scheme(values=INT4, tile=Tile(contracted=64)),
    "int4+zero g64": Scheme(values=INT4, tile=Tile(contracted=64), range=MinMax(), zero_point=INT4),
    "uint4+float16 zero g64": Scheme(
        values=UINT4, tile=Tile(contracted=64), range=MinMax(), zero_point=FLOAT16
    ),
    "e4m3 128x64": Scheme(values=E4M3, tile=Tile(contracted=128, kept=64)),
    "e4m3 1xall": Scheme(values=E4M3, tile=Tile(contracted=1, kept=None)),
    "e4m3 g32, scales e8m0": schemes.MXFP8_E4M3,
    "e2m1 g16, scales e4m3 tensor": schemes.NVFP4,
    "nf4 g64, scales dynamic8 allx32": schemes.NF4_DOUBLE,
    "int4 channel, scales e4m3": Scheme(values=INT4, tile=PER_CHANNEL, scale=E4M3),
}


@pytest.mark.parametrize("text", PRINTED)
def test_a_scheme_prints_in_a_few_words(text: str):
    assert str(PRINTED[text]) == text


TWO_LEVELS = Scheme(values=E4M3, tile=PER_TENSOR)

# arguments -> what the refusal says.
MEANINGLESS = [
    (
        dict(values=INT8, scale=INT8),
        "Scales are held as FLOAT32, BFLOAT16, FLOAT16, E4M3, E5M2, E8M0, or by a scheme of their "
        "own, not as INT8",
    ),
    (dict(values=INT8, scale=NF4), "not as NF4"),
    (dict(values=INT8, scale=E8M0), "E8M0 are powers of two, which the range SharedExponent gives"),
    (dict(values=E8M0), "E8M0 has no zero and no sign: it is for scales"),
    (
        dict(values=INT8, scale=Scheme(values=E4M3, tile=PER_TENSOR, scale=TWO_LEVELS)),
        "Scales are held in one more level, without zero points",
    ),
    (
        dict(
            values=INT8,
            scale=Scheme(values=INT8, tile=PER_TENSOR, range=MinMax(), zero_point=INT8),
        ),
        "without zero points; got .* Use `centered` to take their mean off",
    ),
    (dict(values=INT4, range=MinMax()), "Give both, or neither"),
    (dict(values=INT4, zero_point=INT4), "Give both, or neither"),
    (dict(values=INT8, range=MinMax(), zero_point=INT4), "at least as wide"),
    (dict(values=E4M3, range=MinMax(), zero_point=INT8), "must be integers"),
    (dict(values=INT4, range=MinMax(), zero_point=E4M3), "must be integers"),
    (dict(values=E4M3, range=MinMax(), zero_point=FLOAT16), "held as FLOAT32, BFLOAT16, FLOAT16"),
    (
        dict(values=E4M3, range=AbsMax(convention=Convention.SIGNED)),
        "mean nothing for E4M3; its range has one, HIGHEST; got SIGNED",
    ),
    (dict(values=INT4, range=SharedExponent()), "A shared exponent scales floats, not INT4"),
    (dict(values=INT4, range=Percentile(percent=0.0)), "more than 0 and at most 100"),
    (dict(values=NF4, range=MinMax(), zero_point=INT8), "values and zero point must be integers"),
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
    ((4, 6), Tile(contracted=9), (0, 1), r"Use a divisor of 24.* or Tile\(..., ragged=True\)"),
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


# ... where the last tile of an axis may be short: never longer than the axis; along several axes of
# one role, as many whole ones as fit, then a part of one.
SHORT = [
    ((250, 8), Tile(contracted=100, ragged=True), (0,), (100, 1)),
    ((64, 8), Tile(contracted=100, ragged=True), (0,), (64, 1)),
    ((256, 96), Tile(contracted=128, kept=64, ragged=True), (0,), (128, 64)),
    ((4, 6), Tile(contracted=4, ragged=True), (0, 1), (1, 4)),
    ((4, 6), Tile(contracted=9, ragged=True), (0, 1), (1, 6)),
    ((4, 6), Tile(contracted=13, ragged=True), (0, 1), (2, 6)),
    ((4, 6, 5), Tile(contracted=20, ragged=True), (0, 1), (3, 6, 1)),
    ((5, 6), Tile(contracted=None, kept=None, ragged=True), (0,), (5, 6)),
]


@pytest.mark.parametrize("shape, tile, contracted, expected", SHORT)
def test_a_ragged_tile_ends_at_the_end_of_an_axis(shape, tile, contracted, expected):
    assert tile_shape(shape, tile, contracted=contracted) == expected


def _is_a_run(shape: list[int], size: int) -> bool:
    for n in reversed(shape):
        if size <= n:
            return n % size == 0
        if size % n:
            return False
        size //= n
    return size == 1
