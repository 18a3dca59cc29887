"""What holds for every format, whatever the tiles, the shape and the numbers are.

`CASES` has two rows a format; Hypothesis chooses among them, and the numbers. Compiled functions
are kept, so that no more is compiled than there are cases. That `jit`, `vmap`, `scan` and a loop
give the same is in test_schemes.py, for every scheme there.
"""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from code_values import every_value, values_of
from quantized import around, centered, in_codes, nested, over_codes, same_bits, scales, values

from jaxquant.numerics import (
    AbsMax,
    AbsMean,
    BFLOAT16,
    BINARY,
    Convention,
    DYNAMIC8,
    E4M3,
    E8M0,
    FLOAT32,
    Format,
    FORMATS,
    INT1,
    INT8,
    least_block,
    MinMax,
    SharedExponent,
)
from jaxquant.qarray import (
    check_qarray,
    dequantize,
    Layout,
    PER_CHANNEL,
    PER_TENSOR,
    QArray,
    quantize_array,
    relayout,
    reshape,
    retile,
    Scheme,
    Tile,
    transpose,
)
from jaxquant.qarray._reshape import expand_dims, squeeze

pytestmark = pytest.mark.tables

VALUES = [f for f in FORMATS.values() if f.bits <= 8 and not f.power_of_two]
SLACK = 1.5 * 2.0**-23

# Axis 0 is contracted. Of these, (20, 8) has ragged tiles along one axis, (13, 16) along both.
SHAPES = [
    ((12, 8), Tile(contracted=4)),
    ((20, 8), Tile(contracted=6, ragged=True)),
    ((12, 8), PER_CHANNEL),
    ((13, 16), Tile(contracted=5, kept=6, ragged=True)),
    ((12, 8), Tile(contracted=4, kept=2)),
    ((13, 16), PER_TENSOR),
]
SCALES = [
    FLOAT32,
    Scheme(values=E4M3, tile=PER_TENSOR),
    BFLOAT16,
    Scheme(values=DYNAMIC8, tile=Tile(contracted=2, kept=3, ragged=True), centered=True),
    FLOAT32,
    Scheme(values=INT8, tile=PER_CHANNEL, scale=BFLOAT16),
]


@dataclasses.dataclass(frozen=True)
class Case:
    scheme: Scheme
    shape: tuple[int, ...]

    def __repr__(self) -> str:
        return f"{self.scheme} {self.shape}"


def _scheme(format: Format, i: int) -> Case:
    shape, tile = SHAPES[i % len(SHAPES)]
    scale = SCALES[i // 2 % len(SCALES)]
    rule, zero = AbsMax(), None
    if format == INT1:
        rule = AbsMax(convention=Convention.LOWEST)
    elif format == BINARY:
        rule = AbsMean()
    elif format.integer and (not format.signed or i % 5 == 0):
        rule, zero = MinMax(), dataclasses.replace(format)
    elif format.integer and i % 3 == 0:
        rule = AbsMax(convention=Convention.SIGNED)
    elif format.mantissa is not None and i % 2:
        rule, scale = SharedExponent(), E8M0
    scheme = Scheme(values=format, tile=tile, range=rule, zero_point=zero, scale=scale)
    return Case(scheme=scheme, shape=shape)


CASES = [_scheme(format, i) for i, format in enumerate([*VALUES, *VALUES[::-1]])]


def each_case(holds=lambda scheme: True):
    """A test of each case with a property of its scheme, on a few sets of numbers."""
    found = [case for case in CASES if holds(case.scheme)]

    def decorate(test):
        drawn = hypothesis.settings(max_examples=4)(hypothesis.given(data=st.data())(test))
        return pytest.mark.parametrize("case", found, ids=repr)(drawn)

    return decorate


@st.composite
def _numbers(draw, shape: tuple[int, ...]) -> np.ndarray:
    """Gaussian numbers, with rows of different size, zeros, and values that repeat."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    x = rng.standard_normal(shape).astype(np.float32)
    kind = draw(st.sampled_from(["plain", "rows", "zeros", "few", "one sign"]))
    if kind == "rows":
        x = x * np.exp2(rng.integers(-6, 7, (shape[0], 1))).astype(np.float32)
    if kind == "zeros":
        x[: shape[0] // 2] = 0
        x[:, 1] = 0
    if kind == "few":
        x = np.rint(2 * x)
    return np.abs(x) if kind == "one sign" else x


@functools.cache
def _quantize(scheme: Scheme):
    return jax.jit(lambda x: quantize_array(x, scheme, contracted=(0,)))


@functools.cache
def _fixed(case: Case) -> QArray:
    """One array of a case."""
    x = np.random.default_rng(0).standard_normal(case.shape).astype(np.float32)
    return _quantize(case.scheme)(x)


def _summed(scheme: Scheme) -> bool:
    return centered(scheme) or isinstance(scheme.range, AbsMean)


def _past(scheme: Scheme) -> float:
    """By how many codes a range may clip."""
    match scheme.range:
        case AbsMax(convention=Convention.HIGHEST):
            # DYNAMIC8 has 1, but not -1.
            return max(0.0, scheme.values.highest + scheme.values.lowest)
        case SharedExponent():
            return scheme.values.highest / 3
        case AbsMean():
            return np.inf
    return 1.0


@each_case()
def test_no_value_moves_by_more_than_half_a_gap(data, case: Case):
    """... of the format, in units of its scale; what the range clips, and how far, is stated."""
    x = data.draw(_numbers(case.shape))
    q = _quantize(case.scheme)(x)
    wanted, chosen, zero = in_codes(x.astype(np.float64), q)
    inside = np.clip(wanted, case.scheme.values.lowest, case.scheme.values.highest)
    low, high = around(inside, case.scheme.values)
    slack = SLACK * (np.abs(wanted) + np.abs(zero) + 1)
    assert (np.abs(chosen - inside) <= (high - low) / 2 + slack).all()
    if not nested(case.scheme):
        rounded = 0 if case.scheme.scale in (FLOAT32, E8M0) else 2.0**-8
        reach = case.scheme.values.highest - case.scheme.values.lowest
        assert (np.abs(wanted - inside) <= _past(case.scheme) + rounded * reach + slack).all()


def _met_again(scheme: Scheme) -> bool:
    """Whether the end of the format is met, so that a second range is the first."""
    rule = scheme.range
    met = isinstance(rule, AbsMax) and rule.convention is not Convention.LOWEST
    # A table may have an end on one side only, or one that a rounded scale misses.
    met = met and (scheme.values.table is None or scheme.scale == FLOAT32)
    met = met and (scheme.values.table is None or scheme.values.lowest == -scheme.values.highest)
    met = met or isinstance(rule, SharedExponent)
    return not nested(scheme) and (met or isinstance(rule, MinMax) and scheme.scale == FLOAT32)


@each_case(_met_again)
def test_values_of_a_scheme_stay_what_they_are(data, case: Case):
    x = data.draw(_numbers(case.shape))
    once = values(_quantize(case.scheme)(x)).astype(np.float32)
    twice = values(_quantize(case.scheme)(once))
    # The second scale is the first times two factors that cancel.
    np.testing.assert_allclose(twice, once, rtol=2.0**-22)


@each_case()
def test_powers_of_two_pass_through(data, case: Case):
    x, power = data.draw(_numbers(case.shape)), data.draw(st.integers(-20, 20))
    q, r = (_quantize(case.scheme)(y) for y in (x, x * np.float32(2.0**power)))
    assert same_bits(q.codes, r.codes)
    moved = values(q) * 2.0**power
    if case.scheme.values.has_zero:
        np.testing.assert_array_equal(values(r), moved)
    else:
        # Tiles of zeros have the least scale there is.
        np.testing.assert_allclose(values(r), moved, rtol=0, atol=2.0**-105)


@each_case()
def test_zeros_stay_zero(data, case: Case):
    x = data.draw(_numbers(case.shape))
    back = values(_quantize(case.scheme)(x))
    if case.scheme.values.has_zero:
        assert (back[x == 0] == 0).all()
    q = _quantize(case.scheme)(np.zeros(case.shape, np.float32))
    assert (np.abs(values(q)) <= (0 if case.scheme.values.has_zero else 2.0**-126)).all()


@each_case(lambda s: s.values.packs)
def test_packing_is_undone_by_unpacking(data, case: Case):
    q = _fixed(case)
    least = least_block(case.scheme.values)
    block = data.draw(st.sampled_from([b for b in (least, 8, 16) if q.shape[-1] % b == 0]))
    p = relayout(q, Layout(packed=block))
    check_qarray(p)
    assert p.codes.nbytes * 8 == q.size * case.scheme.values.bits
    np.testing.assert_array_equal(values(p), values(q))
    back = relayout(p, Layout())
    assert all(map(same_bits, jax.tree.leaves(back), jax.tree.leaves(q)))


@hypothesis.settings(max_examples=10)
@hypothesis.given(data=st.data(), case=st.sampled_from([c for c in CASES if not _summed(c.scheme)]))
def test_eager_gives_the_bits_of_jit(data, case: Case):
    """Sums are the exception: the mean that `centered` takes off, and those of some ranges."""
    x = jnp.asarray(data.draw(_numbers(case.shape)))
    q, p = _quantize(case.scheme)(x), quantize_array(x, case.scheme, contracted=(0,))
    assert all(map(same_bits, jax.tree.leaves(q), jax.tree.leaves(p)))


def _second_gap(q: QArray) -> np.ndarray:
    """For each scale that is held as a code, the distance to the farther of the codes beside it."""
    codes = values_of(q.scale.codes, q.scale.scheme.values)
    found = every_value(q.scale.scheme.values)
    gaps = np.pad(np.diff(found), 1)
    at = np.searchsorted(found, codes)
    return np.maximum(gaps[at], gaps[at + 1]) * np.abs(over_codes(q.scale, scales(q.scale)))


RAGGED = [c for c in CASES if c.scheme.tile.ragged and not nested(c.scheme)]


@pytest.mark.parametrize("case", RAGGED[::3], ids=repr)
def test_ragged_tiles_are_those_of_each_piece_alone(case: Case):
    x = np.random.default_rng(1).standard_normal(case.shape).astype(np.float32)
    q = _quantize(case.scheme)(x)
    alone = dataclasses.replace(case.scheme, tile=PER_TENSOR)
    for i in range(q.scale.shape[0]):
        for j in range(q.scale.shape[1]):
            at = tuple(slice(n * t, n * t + t) for n, t in zip((i, j), q.tile, strict=True))
            if q.tile[1] == 1 and j > 1:
                continue  # the columns are alike
            piece = _quantize(alone)(x[at])
            assert same_bits(piece.codes, np.asarray(q.codes)[at])
            assert scales(piece).item() == scales(q)[i, j]


@each_case(nested)
def test_scales_held_as_codes_are_within_half_a_gap_of_those_in_float32(data, case: Case):
    x = data.draw(_numbers(case.shape))
    q = _quantize(case.scheme)(x)
    plain = scales(_quantize(dataclasses.replace(case.scheme, scale=FLOAT32))(x))
    used = np.abs(x).max() > 0 and plain != 1  # any scale will do for a tile of zeros
    away = np.abs(scales(q) - plain)
    # Smallest codes are raised to one that is not 0; that is a gap at most.
    raised = scales(q) <= 1.5 * np.abs(_second_gap(q))
    allowed = np.where(raised, 1.0, 0.5) * _second_gap(q) + 2.0**-21 * np.abs(plain).max()
    assert (away <= allowed)[used].all(), (away / allowed)[used].max()


@st.composite
def _slice(draw, size: int, tile: int) -> slice:
    """Whole tiles, to the end of the axis or not; anything where one tile is the whole axis."""
    if tile >= size:
        start = draw(st.integers(0, size - 1))
        return slice(start, draw(st.integers(start + 1, size)))
    count = -(-size // tile)
    start = draw(st.integers(0, count - 1))
    return slice(start * tile, min(draw(st.integers(start + 1, count)) * tile, size))


def _moves(q: QArray) -> list[str]:
    found = ["slice", "transpose", "expand", "retile", "relayout"]
    return found + ["reshape"] * (q.layout.packed is None)


@each_case()
def test_moving_axes_is_that_of_the_array(data, case: Case):
    """Several moves after each other, on canonical, turned and packed codes: bit for bit."""
    q, expected = _fixed(case), values(_fixed(case))
    for _ in range(data.draw(st.integers(1, 3))):
        move = data.draw(st.sampled_from(_moves(q)))
        if move == "slice":
            axis = data.draw(st.integers(0, q.ndim - 1))
            at = data.draw(_slice(q.shape[axis], q.tile[axis]))
            if q.layout.packed and q.layout.permutation(q.ndim)[-1] == axis:
                at = slice(None)
            index = tuple(at if a == axis else slice(None) for a in range(q.ndim))
            q, expected = q[index], expected[index]
        elif move == "transpose":
            axes = tuple(data.draw(st.permutations(range(q.ndim))))
            q, expected = transpose(q, axes), expected.transpose(axes)
        elif move == "expand":
            axis = data.draw(st.integers(0, q.ndim))
            q, expected = expand_dims(q, (axis,)), np.expand_dims(expected, axis)
            if data.draw(st.booleans()):
                q, expected = squeeze(q, (axis,)), expected.squeeze(axis)
        elif move == "retile":
            axis = data.draw(st.integers(0, q.ndim - 1))
            tile = q.tile[axis]
            finer = [t for t in range(1, tile + 1) if tile % t == 0]
            q = retile(q, axis, data.draw(st.sampled_from(finer)))
        elif move == "relayout":
            least = least_block(q.scheme.values) if q.scheme.values.packs else None
            packs = least is not None and q.stored_shape[-1] % least == 0 and q.ndim == 2
            layout = Layout(order=q.layout.order, packed=least) if packs else Layout()
            q = relayout(q, layout)
        else:
            shape = (q.shape[0], 1, *q.shape[1:])
            if data.draw(st.booleans()) and q.shape[-1] % (2 * q.tile[-1]) == 0:
                shape = (*q.shape[:-1], 2, q.shape[-1] // 2)
            try:
                moved = reshape(q, shape)
            except ValueError as refused:
                assert "would break tiles" in str(refused) or "centered" in str(refused)
                continue
            q, expected = moved, expected.reshape(shape)
    check_qarray(q)
    np.testing.assert_array_equal(values(q), expected)


@pytest.mark.parametrize("case", CASES[::7], ids=repr)
def test_what_was_moved_is_dequantized_to_the_same_bits(case: Case):
    q = _fixed(case)
    moved = transpose(q, (1, 0))[: q.tile[1]]
    assert same_bits(dequantize(moved), np.asarray(dequantize(q)).T[: q.tile[1]])
