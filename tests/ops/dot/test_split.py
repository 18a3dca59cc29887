"""Integer sums, group by group, against NumPy in int64: equal to the last bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products import Case, CASES, exact, operands, product
from quantized import layouts, normal, SCHEMES

from jaxquant.ops.dot import _split
from jaxquant.ops.dot._api import dot_general, make_call
from jaxquant.ops.dot._split import contracted_tiles, group_sums, split
from jaxquant.qarray import Layout, quantize_array, relayout, Scheme


def _call(case: Case, activations: str, weight: str, layout: Layout | None = None):
    sides = operands(case, activations, weight)
    if layout is not None:
        sides[case.weight] = relayout(sides[case.weight], layout)
    return make_call(*sides, case.numbers)


def _sums(call) -> tuple[jax.Array, tuple[int, ...]]:
    tiles = contracted_tiles(call)
    sizes = [call.lhs.shape[axis] for axis in call.contracted[0]]
    grouped = tuple(i for i, (n, t) in enumerate(zip(sizes, tiles, strict=True)) if n != t)

    @jax.jit
    def run(*operands):
        sides = tuple(
            split(q, axes, tiles, jnp.int8)
            for q, axes in zip(operands, call.contracted, strict=True)
        )
        return group_sums(call, sides, grouped, jnp.int32)

    return run(call.lhs, call.rhs), tiles


def _expected(case: Case, call, tiles: tuple[int, ...]) -> np.ndarray:
    """The same sums by `np.einsum`, each contracted axis split into (groups, tile)."""
    inputs, out = case.letters.split("->")
    names, codes = inputs.split(","), []
    batch = len(case.batch[0])
    groups = ""
    for side, q in enumerate((call.lhs, call.rhs)):
        integers = np.asarray(relayout(q, Layout()).codes).astype(np.int64)
        if q.zero_point is not None:
            zero = np.asarray(relayout(q, Layout()).zero_point).astype(np.int64)
            for axis, tile in enumerate(q.tile):
                zero = np.repeat(zero, tile, axis=axis)
            integers = integers - zero
        for i, axis in reversed(sorted(enumerate(case.contracted[side]), key=lambda p: p[1])):
            n, t = integers.shape[axis], tiles[i]
            if t == n:
                continue
            shape = (*integers.shape[:axis], n // t, t, *integers.shape[axis + 1 :])
            integers = integers.reshape(shape)
        codes.append(integers)
    for i, (left, right) in enumerate(zip(*case.contracted, strict=True)):
        if tiles[i] == call.lhs.shape[left]:
            continue
        letter, group = inputs.split(",")[0][left], "ZYX"[i]
        assert inputs.split(",")[1][right] == letter
        names = [name.replace(letter, group + letter) for name in names]
        groups += group
    return np.einsum(f"{','.join(names)}->{out[:batch] + groups + out[batch:]}", *codes)


PAIRS = [
    ("int8 channel", "int8 channel"),
    ("int8 g128 bfloat16", "int8 middle g32"),
    ("int8 tensor", "int4 zero g64"),
    ("int4 signed g32", "int4 g32 bfloat16"),
]


@pytest.mark.parametrize("activations, weight", PAIRS)
@pytest.mark.parametrize("name", CASES)
def test_integer_sums_are_exact(name: str, activations: str, weight: str):
    case = CASES[name]
    call = _call(case, activations, weight)
    got, tiles = _sums(call)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, _expected(case, call, tiles))


@pytest.mark.parametrize("layout", layouts(SCHEMES["int4 zero g64"], first=256, last=24))
def test_integer_sums_are_exact_in_every_layout(layout: Layout):
    case = CASES["rows"]
    call = _call(case, "int8 channel", "int4 zero g64", layout)
    got, tiles = _sums(call)
    np.testing.assert_array_equal(got, _expected(case, call, tiles))


def test_sums_of_extreme_codes_do_not_wrap():
    """2048 products of -128 by -128 need 26 bits."""
    scheme = SCHEMES["int8 middle g32"]
    x = quantize_array(jnp.full((1, 2048), -1.0), scheme)
    x, w = (
        jax.tree.map(lambda leaf: jnp.full_like(leaf, -128) if leaf.dtype == jnp.int8 else leaf, q)
        for q in (x, quantize_array(jnp.full((2048, 1), -1.0), scheme, contracted=(0,)))
    )
    call = make_call(x, w, (((1,), (0,)), ((), ())))
    sums, _ = _sums(call)
    assert (np.asarray(sums) == 32 * 128 * 128).all() and sums.shape == (64, 1, 1)


# Tiles along the contracted axis of both sides, `None` for no quantization -> their common tile.
TILES = [(None, 256, 256), (None, 32, 32), (64, 32, 32), (32, 64, 32), (256, 128, 128), (1, 64, 1)]


@pytest.mark.parametrize("left, right, common", TILES)
def test_both_scales_are_constant_within_the_common_tile(left, right, common):
    def scheme(size: int) -> Scheme:
        tile = type(SCHEMES["int8 channel"].tile)(contracted=size)
        return Scheme(values=SCHEMES["int8 channel"].values, tile=tile)

    x = normal(4, 256)
    x = x if left is None else quantize_array(x, scheme(left))
    w = quantize_array(normal(256, 8), scheme(right), contracted=(0,))
    assert contracted_tiles(make_call(x, w, (((1,), (0,)), ((), ())))) == (common,)


@pytest.mark.parametrize("activations, weight", PAIRS)
@pytest.mark.parametrize("name", CASES)
def test_groups_one_by_one_are_groups_beside_each_other(
    name: str, activations: str, weight: str, monkeypatch: pytest.MonkeyPatch
):
    case = CASES[name]
    sides = operands(case, activations, weight)
    beside = dot_general(*sides, case.numbers, backend="xla")
    monkeypatch.setattr(_split, "MOST_SUMS_BYTES", 0)
    found = dot_general(*sides, case.numbers, backend="xla")
    # A float32 sum of a few groups in two orders.
    sizes = np.einsum(case.letters, *(abs(exact(side)) for side in sides))
    assert (abs(np.asarray(found) - np.asarray(beside)) <= 16 * 2.0**-24 * sizes).all()


def test_groups_one_by_one_hold_no_sums_of_others(monkeypatch: pytest.MonkeyPatch):
    sides = operands(CASES["rows"], "int8 channel", "int4 zero g64")
    monkeypatch.setattr(_split, "MOST_SUMS_BYTES", 0)
    program = jax.make_jaxpr(lambda *q: dot_general(*q, CASES["rows"].numbers, backend="xla"))
    text = str(program(*sides))
    assert "while" in text or "scan" in text
    groups, out = 256 // 64, product(CASES["rows"], *sides).shape
    assert f"f32[{','.join(map(str, (groups, *out)))}]" not in text
