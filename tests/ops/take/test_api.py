"""Lookups against `jnp.take` and `lax.gather` of the dequantized array: equal to the last bit."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from quantized import layouts, normal, SCHEMES, uneven

from jaxquant.ops import gather, take
from jaxquant.ops.take._api import refuses
from jaxquant.qarray import dequantize, Layout, QArray, quantize_array, relayout

ROWS = 64


@functools.cache
def _table(name: str, dtype: jnp.dtype = jnp.float32) -> QArray:
    """An embedding: rows are looked up, features are summed when it gives the logits."""
    scheme = SCHEMES[name]
    if scheme.tile == SCHEMES["int8 block"].tile:
        # Blocks of 16 rows: positions along the looked-up axis share scales in part.
        scheme = dataclasses.replace(scheme, tile=type(scheme.tile)(contracted=128, kept=16))
    return jax.jit(lambda x: quantize_array(x, scheme))(uneven(ROWS, 256, dtype=dtype))


INDICES = {
    "one": jnp.asarray(5),
    "a list": jnp.asarray([0, 63, 7, 7]),
    "a batch": jnp.asarray([[0, 63, 1], [62, 5, 5]]),
    "three axes": jnp.arange(24).reshape(2, 3, 4) * 2,
    "none": jnp.zeros((0,), jnp.int32),
    "negative": jnp.asarray([-1, -64, 3]),
    "outside": jnp.asarray([[64, -65, 1000, 2], [-1000, 2**31 - 1, -(2**31), 63]]),
    "bytes": jnp.asarray([0, 63, -1, 127], jnp.int8),
    "unsigned": jnp.asarray([0, 63, 64, 2**32 - 1], jnp.uint32),
}


@pytest.mark.parametrize("mode", [None, "fill", "clip", "wrap"])
@pytest.mark.parametrize("kind", INDICES)
def test_it_is_jnp_take_for_any_index(kind: str, mode: str | None):
    q, indices = _table("int8 channel"), INDICES[kind]
    expected = jnp.take(dequantize(q), indices, axis=0, mode=mode)
    for run in (take, jax.jit(take, static_argnames="mode")):
        got = run(q, indices, mode=mode)
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)


TABLE = [
    pytest.param(name, layout, id=f"{name} {layout}")
    for name in SCHEMES
    for layout in layouts(SCHEMES[name], first=ROWS, last=256)
    if name in ("int8 channel", "int4 zero g64", "int8 block") or layout == Layout()
]


@pytest.mark.parametrize("name, layout", TABLE)
def test_it_is_jnp_take_for_every_scheme_and_layout(name: str, layout: Layout):
    for dtype in (jnp.float32, jnp.bfloat16):
        q = _table(name, dtype)
        got = jax.jit(take)(relayout(q, layout), INDICES["outside"])
        expected = jnp.take(dequantize(q), INDICES["outside"], axis=0)
        assert got.dtype == dtype
        # NumPy does not take bfloat16's NaN for NaN.
        np.testing.assert_array_equal(*(np.asarray(x).astype(np.float32) for x in (got, expected)))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.uint32])
def test_indices_may_be_too_small_to_count_the_rows(dtype: jnp.dtype):
    q = quantize_array(normal(300, 8), SCHEMES["int8 channel"])
    indices = jnp.asarray([0, 5, 127, 100]).astype(dtype)
    for mode in ("fill", "clip", "wrap"):
        got = take(q, indices, mode=mode)
        np.testing.assert_array_equal(got, dequantize(q)[indices.astype(jnp.int32)])
    if jnp.issubdtype(dtype, jnp.signedinteger):
        np.testing.assert_array_equal(
            take(q, -indices[1:]), dequantize(q)[-np.asarray([5, 127, 100])]
        )


def test_rows_outside_are_nan():
    got = take(_table("int4 zero g64"), jnp.asarray([63, 64, -64, -65]))
    assert np.isnan(np.asarray(got)).all(axis=1).tolist() == [False, True, False, True]


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="modes 'fill', 'clip' and 'wrap', not 'raise'"):
        take(_table("int8 channel"), jnp.asarray([1]), mode="raise")


def test_it_works_in_vmap_and_scan_over_stacked_tables():
    scheme = SCHEMES["int4 zero g64"]
    stack = quantize_array(uneven(3, ROWS, 256), scheme, stack=(0,))
    stack = relayout(stack, Layout(packed=256))
    ids = jnp.asarray([[1, 5], [0, 63], [64, -1]])
    expected = jnp.take_along_axis(dequantize(stack), ids[..., None], axis=1, mode="fill")
    np.testing.assert_array_equal(jax.vmap(take)(stack, ids), expected)
    _, scanned = lax.scan(lambda _, qi: (None, take(*qi)), None, (stack, ids))
    np.testing.assert_array_equal(scanned, expected)


def _largest_made(q: QArray, indices: jax.Array) -> int:
    """Elements of the largest result in the compiled lookup that is no parameter."""
    compiled = jax.jit(take).lower(q, indices).compile()
    entry = compiled.as_text().partition("ENTRY")[2]
    made = re.findall(r"= \w+\[([\d,]*)\](?!.* parameter\()", entry)
    # ... and what stands inside of fusions as a constant.
    made += re.findall(r"= \w+\[([\d,]*)\]\S* constant\(", compiled.as_text())
    return max(math.prod(int(n) for n in shape.split(",") if n) for shape in made)


@pytest.mark.parametrize(
    "name, layout",
    [
        ("int8 channel", Layout()),
        ("int8 tensor", Layout()),
        ("int8 block", Layout()),
        ("int4 zero g64", Layout()),
        ("int4 zero g64", Layout(wide=True)),
        ("int4 zero g64", Layout(packed=256)),
        ("int4 channel", Layout(packed=64)),
        ("int4 zero g64", Layout(order=(-1, -2))),
        ("e4m3 g64 bfloat16", Layout()),
    ],
)
def test_nothing_as_large_as_the_table_is_made(name: str, layout: Layout):
    assert _largest_made(relayout(_table(name), layout), jnp.asarray([3, 70])) <= 2 * 256


# shape, where offsets stand in the result, collapsed axes, slice sizes, axes of an index.
PATTERNS = {
    "rows": ((8, 64), (1,), (0,), (1, 64), (0,)),
    "columns": ((64, 8), (0,), (1,), (64, 1), (1,)),
    "features in front": ((8, 64), (0,), (0,), (1, 64), (0,)),
    "a row that is kept": ((8, 64), (1, 2), (), (1, 64), (0,)),
    "neighbouring rows": ((8, 64), (1, 2), (), (3, 64), (0,)),
    "from a stack": ((3, 8, 64), (1,), (0, 1), (1, 1, 64), (0, 1)),
    "from a stack, backwards": ((3, 8, 64), (1,), (0, 1), (1, 1, 64), (1, 0)),
    "a slab": ((3, 8, 64), (0, 2), (1,), (3, 1, 64), (1,)),
    "single elements": ((8, 64), (), (0, 1), (1, 1), (0, 1)),
    "part of a row": ((8, 64), (1,), (0,), (1, 16), (0, 1)),
    "the whole": ((8, 64), (1, 2), (), (8, 64), (0,)),
}


@pytest.mark.parametrize("name", ["int8 channel", "int4 zero g64", "int8 tensor"])
@pytest.mark.parametrize("mode", ["fill", "clip", "promise_in_bounds"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_any_gather_is_that_of_the_array(pattern: str, mode: str, name: str):
    shape, offsets, collapsed, slice_sizes, index_map = PATTERNS[pattern]
    axis = shape.index(64)
    q = quantize_array(uneven(*shape), SCHEMES[name], contracted=(axis,))
    numbers = lax.GatherDimensionNumbers(
        offset_dims=offsets, collapsed_slice_dims=collapsed, start_index_map=index_map
    )
    limits = [shape[a] - slice_sizes[a] for a in index_map]
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, limit + 1, 5) for limit in limits]
    indices = np.stack(rows, axis=-1)
    if mode != "promise_in_bounds":
        indices = np.concatenate([indices, indices[:1] - 100, indices[:1] + 100, indices[:1] * 0])
    indices = jnp.asarray(indices)
    params = dict(dimension_numbers=numbers, slice_sizes=slice_sizes, mode=mode)
    expected = lax.gather(dequantize(q), indices, **params)
    orders = [None, tuple(range(-1, -len(shape) - 1, -1))]
    for order in orders:
        p = relayout(q, Layout(order=order))
        got = jax.jit(lambda p, i: gather(p, i, **params))(p, indices)
        np.testing.assert_array_equal(got, expected)
    if mode == "fill":
        filled = gather(q, indices, fill_value=7.0, unique_indices=True, **params)
        np.testing.assert_array_equal(
            filled, lax.gather(dequantize(q), indices, fill_value=7.0, **params)
        )


def test_batches_of_tables_are_looked_up_side_by_side():
    """What `vmap` of a lookup makes, here on axes in another order."""
    table = uneven(8, 3, 64)
    q = quantize_array(table, SCHEMES["int4 zero g64"])
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(2,),
        collapsed_slice_dims=(0,),
        start_index_map=(0,),
        operand_batching_dims=(1,),
        start_indices_batching_dims=(0,),
    )
    indices = jnp.asarray([[1, 7], [0, 8], [3, 3]])[..., None]
    params = dict(dimension_numbers=numbers, slice_sizes=(1, 1, 64), mode="fill")
    expected = lax.gather(dequantize(q), indices, **params)
    for layout in [
        Layout(),
        Layout(packed=32),
        Layout(order=(-1, -3, -2)),
        Layout(order=(-2, -3, -1)),
    ]:
        got = gather(relayout(q, layout), indices, **params)
        np.testing.assert_array_equal(got, expected)
        assert got.shape == (3, 2, 64)


REFUSED = [
    (Layout(), (8, 1), None),
    (Layout(), (1, 64), None),
    (Layout(), (8, 16), "slices of 16 along axis 1 may begin inside one of its tiles of 32"),
    (Layout(packed=64), (8, 64), None),
    (Layout(packed=64), (8, 1), "axis 1 is looked up by position, but its codes are packed"),
    (Layout(order=(-1, -2), packed=8), (1, 64), "axis 0 is looked up by position, but its codes"),
]


@pytest.mark.parametrize("layout, slice_sizes, reason", REFUSED)
def test_what_cannot_be_fetched_before_it_is_dequantized_has_a_reason(layout, slice_sizes, reason):
    q = quantize_array(normal(8, 64), SCHEMES["int4 g32 bfloat16"])
    got = refuses(relayout(q, layout), slice_sizes)
    assert got == reason if reason is None else reason in got
