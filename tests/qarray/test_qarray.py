import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantized import codes_of, normal, same_bits, SCHEMES, uneven, values

from jaxquant.qarray import (
    bytes_held,
    check_qarray,
    dequantize,
    in_memory,
    is_qarray,
    Layout,
    QArray,
    quantize_array,
    relayout,
)

# For a 256 x 128 weight: bytes, written out by hand as codes + scales + zero points.
BYTES = {
    "int8 channel": 256 * 128 + 128 * 4,
    "int8 tensor": 256 * 128 + 4,
    "int8 g128 bfloat16": 256 * 128 + 2 * 128 * 2,
    "int8 middle g32": 256 * 128 + 8 * 128 * 4,
    "int8 block": 256 * 128 + 2 * 4,
    "int8 zero channel": 256 * 128 + 128 * 4 + 128,
    "int4 channel": 128 * 128 + 128 * 4,
    "int4 g32 bfloat16": 128 * 128 + 8 * 128 * 2,
    "int4 middle g64": 128 * 128 + 4 * 128 * 4,
    "int4 lowest g128 float16": 128 * 128 + 2 * 128 * 2,
    "int4 signed g32": 128 * 128 + 8 * 128 * 4,
    "int4 zero g64": 128 * 128 + 4 * 128 * 4 + 4 * 128 // 2,
    "int4 wide zero g32 bfloat16": 128 * 128 + 8 * 128 * 2 + 8 * 128,
    "e4m3 channel": 256 * 128 + 128 * 4,
    "e4m3 g64 bfloat16": 256 * 128 + 4 * 128 * 2,
    "e4m3 block": 256 * 128 + 2 * 4,
    "e5m2 tensor": 256 * 128 + 4,
    "mxfp8": 256 * 128 + 8 * 128,
    "mxfp6 e3m2": 192 * 128 + 8 * 128,
    "mxfp6 e2m3": 192 * 128 + 8 * 128,
    "mxfp4": 128 * 128 + 8 * 128,
    "nvfp4": 128 * 128 + 16 * 128 + 4,
    "nf4": 128 * 128 + 4 * 128 * 4,
    # A byte a scale, a float32 for 32 channels, and the mean.
    "nf4 double": 128 * 128 + 4 * 128 + 4 * 4 + 4,
    "fp4": 128 * 128 + 4 * 128 * 4,
    "ternary": 64 * 128 + 4,
    "binary": 32 * 128 + 128 * 4,
    "int2 zero g64": 64 * 128 + 4 * 128 * 4 + 4 * 128 // 4,
    "int3 g32": 96 * 128 + 6 * 128 + 128 * 4,
    "int5 channel": 160 * 128 + 128 * 4,
    "uint4 zero g64": 128 * 128 + 4 * 128 * 4 + 4 * 128 // 2,
    "uint4 real zero g64": 128 * 128 + 4 * 128 * 2 + 4 * 128 * 2,
    "int8 real zero channel": 256 * 128 + 128 * 4 + 128 * 2,
    "int6 ragged g100": 192 * 128 + 3 * 128 * 4,
    "e4m3 ragged block": 256 * 128 + 3 * 2 * 2,
    "int4 percentile": 128 * 128 + 4 * 128 * 4,
    "int4 mse": 128 * 128 + 4 * 128 * 4,
    "int8 rms": 256 * 128 + 2 * 128 * 4,
    "int8 fixed": 256 * 128 + 128 * 4,
}


@pytest.mark.parametrize("name", SCHEMES)
def test_bytes_and_bits_count_scales_and_zero_points(name: str):
    q = codes_of(SCHEMES[name], 256, 128)
    assert q.nbytes == bytes_held(q) == BYTES[name]
    assert q.bits_per_value == BYTES[name] / 4096
    shapes = jax.eval_shape(lambda: q)
    assert bytes_held(shapes) == BYTES[name]


def test_int4_in_groups_of_128_is_4_125_bits_and_4_156_with_zero_points():
    """Numbers that other libraries publish for a float16 scale and a 4-bit zero point."""
    x = uneven(256, 128)
    assert (
        quantize_array(x, SCHEMES["int4 lowest g128 float16"], contracted=(0,)).bits_per_value
        == 4.125
    )
    scheme = dataclasses.replace(
        SCHEMES["int4 zero g64"],
        tile=SCHEMES["int4 lowest g128 float16"].tile,
        scale=SCHEMES["int4 lowest g128 float16"].scale,
    )
    assert quantize_array(x, scheme, contracted=(0,)).bits_per_value == 4.15625


def test_an_odd_number_of_small_codes_is_rounded_up_to_a_byte():
    q = quantize_array(normal(3, 5), SCHEMES["int4 channel"], contracted=(0,))
    assert q.nbytes == 8 + 5 * 4


def test_bytes_of_plain_arrays_are_counted_too():
    assert bytes_held(jnp.zeros((3, 4), jnp.bfloat16)) == 24
    assert bytes_held(jax.ShapeDtypeStruct((3, 4), jnp.int8)) == 12


def test_it_looks_like_the_array_that_it_stands_for():
    q = quantize_array(
        normal(256, 128, dtype=jnp.bfloat16), SCHEMES["int4 zero g64"], contracted=(0,)
    )
    packed = relayout(q, Layout(order=(-1, -2), packed=64))
    for held in (q, packed):
        assert (held.shape, held.ndim, held.size, held.dtype) == (
            (256, 128),
            2,
            256 * 128,
            jnp.bfloat16,
        )
        assert held.tile == (64, 1)
        assert is_qarray(held) and not is_qarray(held.codes)
        assert dequantize(held).dtype == jnp.bfloat16
        assert dequantize(held, jnp.float32).dtype == jnp.float32
        assert held.T.shape == (128, 256)
    assert packed.stored_shape == (128, 256) and packed.stored_tile == (1, 64)
    assert repr(packed) == "QArray(256x128 int4+zero g64, 4.562 bits/value)"


def test_it_prints_whatever_its_leaves_are():
    q = quantize_array(normal(4, 4), SCHEMES["int8 channel"])
    assert repr(jax.tree.map(lambda leaf: None, q, is_leaf=None)).startswith("QArray(int8 channel")


def test_it_is_a_pytree_with_static_facts():
    q = quantize_array(normal(256, 128), SCHEMES["int4 zero g64"], contracted=(0,))
    assert len(jax.tree.leaves(q)) == 3
    doubled = jax.tree.map(lambda leaf: leaf, q)
    assert isinstance(doubled, QArray) and jax.tree.structure(doubled) == jax.tree.structure(q)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(q)]
    assert names == [".codes", ".scale", ".zero_point"]
    other = relayout(q, Layout(packed=128))
    assert jax.tree.structure(other) != jax.tree.structure(q)


# What was stacked is also what comes off: axis 0 for every layout, and others where no order of
# stored axes is fixed.
STACKED = [
    (Layout(), 0),
    (Layout(), 1),
    (Layout(), 2),
    (Layout(order=(-1, -2)), 0),
    (Layout(packed=128), 0),
    (Layout(packed=128), 1),
    (Layout(order=(-1, -2), packed=64), 0),
    (Layout(wide=True), 0),
]


@pytest.mark.parametrize("layout, axis", STACKED)
def test_arrays_stack_and_unstack_like_any_pytree(layout: Layout, axis: int):
    scheme = SCHEMES["int4 zero g64"]
    each = [codes_of(scheme, 256, 128, seed=i) for i in range(3)]
    each = [relayout(q, layout) for q in each]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *each)
    check_qarray(stack)
    shape, tile = [256, 128], [64, 1]
    shape.insert(axis, 3), tile.insert(axis, 1)
    assert (stack.shape, stack.tile) == (tuple(shape), tuple(tile))
    whole = np.stack([values(q) for q in each], axis)
    np.testing.assert_array_equal(values(stack), whole)
    if axis == 0:
        np.testing.assert_array_equal(values(stack[1]), whole[1])

    mapped = jax.vmap(dequantize, in_axes=axis)(stack)
    np.testing.assert_array_equal(mapped, np.stack([dequantize(q) for q in each]))
    moved = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, axis, 0), stack)
    _, scanned = jax.lax.scan(lambda _, q: (None, dequantize(q)), None, moved)
    np.testing.assert_array_equal(scanned, mapped)


def test_a_carried_array_keeps_its_type_through_a_loop():
    q = codes_of(SCHEMES["int4 zero g64"], 256, 128)
    looped = jax.lax.fori_loop(0, 3, lambda _, q: dataclasses.replace(q, scale=q.scale * 2), q)
    np.testing.assert_array_equal(values(looped), values(q) * 8)


def test_donating_one_frees_its_buffers():
    q = quantize_array(normal(256, 128), SCHEMES["int8 zero channel"], contracted=(0,))
    expected = values(q) * 2
    leaves = jax.tree.leaves(q)
    step = jax.jit(lambda q: dataclasses.replace(q, scale=q.scale * 2), donate_argnums=0)
    after = step(q)
    assert all(leaf.is_deleted() for leaf in leaves)
    np.testing.assert_array_equal(values(after), expected)


def test_a_centered_array_is_dequantized_to_the_same_bits_under_jit():
    """A product and a sum may be fused to one operation, which is rounded once."""
    scheme = dataclasses.replace(SCHEMES["int8 middle g32"], centered=True)
    q = codes_of(scheme, 256, 128)
    assert q.offset.shape == (1, 1)
    expected = values(q).astype(np.float32)
    assert same_bits(dequantize(q), expected) and same_bits(jax.jit(dequantize)(q), expected)


def test_one_function_compiles_once_for_each_layout():
    traces = []

    @jax.jit
    def back(q):
        traces.append(q.layout)
        return dequantize(q)

    q = quantize_array(normal(256, 128), SCHEMES["int4 channel"], contracted=(0,))
    for layout in (Layout(), Layout(packed=128), Layout(), Layout(packed=128)):
        assert same_bits(back(relayout(q, layout)), dequantize(q))
    assert traces == [Layout(), Layout(packed=128)]


def _broken(**changes: object) -> QArray:
    q = quantize_array(normal(256, 128), SCHEMES["int4 zero g64"], contracted=(0,))
    return dataclasses.replace(q, **changes)


BROKEN = [
    (dict(codes=jnp.zeros((256, 128), jnp.int8)), TypeError, "INT4 are stored as int4.*are int8"),
    (dict(layout=Layout(packed=2)), TypeError, "stored as uint8, but these are int4"),
    (dict(layout=Layout(wide=True)), TypeError, "stored as int8, but these are int4"),
    (dict(scale=jnp.zeros((4, 128), jnp.bfloat16)), TypeError, "FLOAT32, but these are bfloat16"),
    (dict(zero_point=None), ValueError, r"int4\+zero g64 and the zero_point NoneType disagree"),
    (dict(scheme=SCHEMES["int4 middle g64"]), ValueError, "int4 g64 and the zero_point .* disagr"),
    (dict(scale=jnp.zeros((3, 128))), ValueError, r"scale of shape \(3, 128\) cannot tile"),
    (dict(scale=jnp.zeros((128,))), ValueError, "ranks must agree"),
    (dict(scale=jnp.zeros((0, 128))), ValueError, "each axis must divide"),
    (dict(zero_point=jnp.zeros((5, 128), jnp.int4)), ValueError, r"zero_point of shape \(5, 128\)"),
]


@pytest.mark.parametrize("changes, error, message", BROKEN)
def test_leaves_that_do_not_fit_together_are_named(changes: dict, error: type, message: str):
    with pytest.raises(error, match=message):
        check_qarray(_broken(**changes))


def test_parts_that_are_no_jax_arrays_are_read_into_memory():
    q = quantize_array(normal(8, 4), next(iter(SCHEMES.values())))
    read = in_memory(jax.tree.map(np.asarray, q))
    assert jax.tree.structure(read) == jax.tree.structure(q)
    for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(q), strict=True):
        assert isinstance(a, jax.Array) and a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    # What is there already is not copied.
    assert in_memory(q).codes is q.codes
