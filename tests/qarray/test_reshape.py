"""Shapes and tiles after a reshape, `retile`, `astype`; slices are in test_reshape_slices.py."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from quantized import codes_of, layouts, SCHEMES, uneven, values

from jaxquant.qarray import (
    astype,
    check_qarray,
    dequantize,
    Layout,
    QArray,
    quantize_array,
    relayout,
    reshape,
    retile,
    Scheme,
    transpose,
)
from jaxquant.qarray._reshape import (
    expand_dims,
    flat_tile,
    matching_axes,
    reshaped_tile,
    squeeze,
)

SOME = ["int8 channel", "int8 block", "int4 zero g64", "e4m3 g64 bfloat16", "int8 tensor"]
TABLE = [
    pytest.param(SCHEMES[name], layout, id=f"{name} {layout}")
    for name in SOME
    for layout in layouts(SCHEMES[name], first=256, last=128)
]


def _weight(scheme: Scheme, layout: Layout) -> QArray:
    return relayout(codes_of(scheme, 256, 128), layout)


@pytest.mark.parametrize("scheme, layout", TABLE)
def test_transposing_moves_axes_and_no_memory(scheme: Scheme, layout: Layout):
    q = _weight(scheme, layout)
    assert q.T.codes is q.codes and q.T.scale is q.scale
    np.testing.assert_array_equal(values(q.T), values(q).T)
    assert (q.T.shape, q.T.tile) == (q.shape[::-1], q.tile[::-1])
    assert q.T.T.layout == q.layout


@pytest.mark.parametrize("layout", layouts(SCHEMES["int4 zero g64"], first=256, last=128))
@pytest.mark.parametrize("permutation", [(0, 2, 1), (1, 2, 0), (2, 0, 1), (2, 1, 0), (1, 0, 2)])
def test_transposing_three_axes_is_that_of_the_array(layout: Layout, permutation: tuple):
    q = codes_of(SCHEMES["int4 zero g64"], 4, 256, 128, contracted=(1,), stack=(0,))
    moved = transpose(relayout(q, layout), permutation)
    check_qarray(moved)
    np.testing.assert_array_equal(values(moved), values(q).transpose(permutation))
    again = transpose(moved, permutation)
    np.testing.assert_array_equal(
        values(again), values(q).transpose(permutation).transpose(permutation)
    )


# scheme, new shape of a 256 x 128 weight whose axis 0 is contracted, its tile.
RESHAPED = [
    ("int8 channel", (4, 64, 128), (4, 64, 1)),
    ("int8 channel", (256, 8, 16), (256, 1, 1)),
    ("int8 channel", (1, 256, 1, 128), (1, 256, 1, 1)),
    ("int4 zero g64", (4, 64, 128), (1, 64, 1)),
    ("int4 zero g64", (2, 128, 128), (1, 64, 1)),
    ("int4 zero g64", (16, 16, 2, 64), (4, 16, 1, 1)),
    ("int8 tensor", (32768,), (32768,)),
    ("int8 tensor", (8, 32, 128), (8, 32, 128)),
    ("int8 block", (2, 128, 128), (1, 128, 128)),
    ("int8 block", (32768,), (16384,)),
]


@pytest.mark.parametrize("name, shape, tile", RESHAPED)
def test_a_reshape_that_keeps_tiles_whole_is_that_of_the_array(name, shape, tile):
    for layout in layouts(SCHEMES[name], first=256, last=128):
        q = _weight(SCHEMES[name], layout)
        r = jax.jit(reshape, static_argnums=1)(q, shape)
        check_qarray(r)
        assert (r.shape, r.tile, r.nbytes) == (shape, tile, q.nbytes)
        np.testing.assert_array_equal(values(r), values(q).reshape(shape))


BROKEN = [
    ("int8 channel", (128, 256)),
    ("int8 channel", (32768,)),
    ("int4 zero g64", (8, 32 * 128)),
]


@pytest.mark.parametrize("name, shape", BROKEN)
def test_a_reshape_that_breaks_tiles_is_refused_with_a_way_out(name, shape):
    message = "would break tiles of .* Reshape the array before it is quantized, or dequantize"
    with pytest.raises(ValueError, match=message):
        reshape(_weight(SCHEMES[name], Layout()), shape)


@pytest.mark.parametrize("shape", [(3, 256, 128), (255, 128), (256,), (), (-1, 128)])
def test_a_reshape_to_another_number_of_elements_is_refused(shape):
    message = r"32768 elements of shape \(256, 128\) cannot take the shape"
    with pytest.raises(ValueError, match=message):
        reshape(_weight(SCHEMES["int8 tensor"], Layout()), shape)


def test_squeezing_and_expanding_follow_the_stored_order():
    q = codes_of(SCHEMES["int4 zero g64"], 1, 256, 128, contracted=(1,))
    for layout in [*layouts(q.scheme, first=256, last=128), Layout(order=(-1, -3, -2))]:
        p = relayout(q, layout)
        narrow = squeeze(p, (0,))
        check_qarray(narrow)
        np.testing.assert_array_equal(values(narrow), values(q)[0])
        for axes in [(0,), (1,), (2,), (0, 1), (1, 3)]:
            wide = expand_dims(narrow, axes)
            check_qarray(wide)
            np.testing.assert_array_equal(values(wide), np.expand_dims(values(narrow), axes))
            np.testing.assert_array_equal(values(squeeze(wide, axes)), values(narrow))


@pytest.mark.parametrize("scheme, layout", TABLE)
def test_finer_tiles_hold_the_same_values(scheme: Scheme, layout: Layout):
    q = _weight(scheme, layout)
    fine = retile(q, 0, 32)
    check_qarray(fine)
    assert fine.tile == (32, q.tile[1])
    assert fine.codes is q.codes
    np.testing.assert_array_equal(values(fine), values(q))


def test_tiles_are_only_cut_into_equal_parts():
    q = _weight(SCHEMES["int4 zero g64"], Layout())
    with pytest.raises(ValueError, match="64 along axis 0 cannot be cut into tiles of 48"):
        retile(q, 0, 48)


def test_another_dtype_changes_what_is_dequantized_and_nothing_else():
    q = _weight(SCHEMES["int8 channel"], Layout())
    half = astype(q, "bfloat16")
    assert half.codes is q.codes and half.scale is q.scale
    assert dequantize(half).dtype == half.dtype == "bfloat16"


SIZES = st.sampled_from([1, 2, 3, 4, 6, 8])


@st.composite
def _array_and_tile(draw) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shape = tuple(draw(st.lists(SIZES, min_size=1, max_size=4)))
    tile = tuple(draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0])) for n in shape)
    return shape, tile


@st.composite
def _same_size(draw, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Another shape with as many elements."""
    left, new = math.prod(shape), []
    while left > 1:
        new.append(draw(st.sampled_from([d for d in range(1, left + 1) if left % d == 0])))
        left //= new[-1]
        if len(new) == 5:
            new.append(left)
            break
    return tuple(new)


@hypothesis.given(data=st.data())
def test_matching_axes_are_the_finest_runs_of_equal_size(data):
    old, _ = data.draw(_array_and_tile())
    new = data.draw(_same_size(old))
    pairs = matching_axes(old, new)
    assert [a for axes, _ in pairs for a in axes] == list(range(len(old)))
    assert [a for _, axes in pairs for a in axes] == list(range(len(new)))
    for old_axes, new_axes in pairs:
        sizes = [old[a] for a in old_axes], [new[a] for a in new_axes]
        assert math.prod(sizes[0]) == math.prod(sizes[1])
        inner = [{math.prod(part[:i]) for i in range(1, len(part))} for part in sizes]
        assert not (inner[0] & inner[1]) - {1, math.prod(sizes[0])}


def _labels(shape: tuple[int, ...], tile: tuple[int, ...]) -> np.ndarray:
    """For each element, which tile it is in."""
    places = [np.arange(n) // t for n, t in zip(shape, tile, strict=True)]
    counts = [n // t for n, t in zip(shape, tile, strict=True)]
    return np.ravel_multi_index(np.meshgrid(*places, indexing="ij"), counts)


def _is_tiling(labels: np.ndarray, tile: tuple[int, ...]) -> bool:
    """Whether `labels` name the boxes that `tile` cuts, in any order."""
    pairs = set(zip(labels.ravel().tolist(), _labels(labels.shape, tile).ravel(), strict=True))
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


@hypothesis.given(data=st.data())
def test_a_reshaped_tile_holds_the_same_elements(data):
    """... and a refusal is never for a reshape that merges or splits runs within one tile."""
    old, tile = data.draw(_array_and_tile())
    new = data.draw(_same_size(old))
    labels = _labels(old, tile).reshape(new)
    try:
        got = reshaped_tile(old, tile, new)
    except ValueError:
        assert not _box_of_runs(old, tile, new)
        return
    assert _is_tiling(labels, got)
    # Scales are reshaped as they lie, so the tiles must keep their order too.
    counts = [n // t for n, t in zip(new, got, strict=True)]
    first = [slice(None, None, t) for t in got]
    assert (labels[tuple(first)].reshape(-1) == np.arange(math.prod(counts))).all()


def _box_of_runs(old, tile, new) -> bool:
    for old_axes, new_axes in matching_axes(old, new):
        run = flat_tile(tuple(old[a] for a in old_axes), tuple(tile[a] for a in old_axes))
        if run is None:
            return False
        for axis in reversed(new_axes):
            if run % new[axis] and new[axis] % run:
                return False
            run = max(1, run // new[axis])
    return True


@hypothesis.given(_array_and_tile())
def test_a_flat_tile_is_a_run(array):
    shape, tile = array
    labels = _labels(shape, tile).ravel()
    changes = 1 + int((np.diff(labels) != 0).sum())
    run = flat_tile(shape, tile)
    if run is None:
        assert changes > labels.max() + 1
    else:
        assert changes == labels.max() + 1 and (labels == np.arange(labels.size) // run).all()


@hypothesis.given(data=st.data())
def test_reshaping_a_qarray_is_reshaping_what_it_stands_for(data):
    old, tile = data.draw(_array_and_tile())
    new = data.draw(_same_size(old))
    # NumPy leaves, so that nothing is compiled.
    rng = np.random.default_rng(0)
    scales = [n // t for n, t in zip(old, tile, strict=True)]
    scheme = SCHEMES["int4 zero g64"]
    q = QArray(
        codes=rng.integers(-8, 8, old).astype(scheme.values.storage),
        scale=rng.standard_normal(scales).astype(np.float32),
        zero_point=rng.integers(-8, 8, scales).astype(scheme.values.storage),
        scheme=scheme,
        layout=Layout(),
        dtype=np.dtype(np.float32),
    )
    try:
        r = reshape(q, new)
    except ValueError:
        return
    check_qarray(r)
    np.testing.assert_array_equal(values(r), values(q).reshape(new))


def test_a_single_number_may_be_held_too():
    q = reshape(quantize_array(uneven(1), SCHEMES["int8 tensor"]), ())
    check_qarray(q)
    assert (q.shape, q.tile, q.ndim, q.nbytes) == ((), (), 0, 5)
    assert repr(q) and dequantize(q).shape == ()
