"""Placing QArrays over four devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from quantized import codes_of, layouts, SCHEMES, uneven, values

from jaxquant.qarray import (
    CANONICAL,
    constrain,
    dequantize,
    Layout,
    leaf_specs,
    place,
    QArray,
    quantize_array,
    relayout,
    shardings_like,
)
from jaxquant.qarray._sharding import replicated_axes, shards_of

MESH = Mesh(np.asarray(jax.devices()).reshape(2, 2), ("a", "b"))
LINE = Mesh(np.asarray(jax.devices()), ("x",))
ZERO_64, CHANNEL = SCHEMES["int4 zero g64"], SCHEMES["int8 channel"]


def _weight(scheme=ZERO_64, layout: Layout = CANONICAL, rows: int = 256) -> QArray:
    return relayout(codes_of(scheme, rows, 128), layout)


def test_an_entry_of_a_spec_cuts_as_its_axes_say():
    entries = [None, P.UNCONSTRAINED, "a", ("a", "b"), ()]
    assert [shards_of(entry, MESH) for entry in entries] == [1, 1, 2, 4, 1]


# scheme, layout, rows, spec of the weight -> specs of codes and of scales (in stored order).
SPECS = [
    (CHANNEL, CANONICAL, 256, P("a", "b"), P("a", "b"), P(None, "b")),
    (CHANNEL, CANONICAL, 256, P(None, ("a", "b")), P(None, ("a", "b")), P(None, ("a", "b"))),
    (CHANNEL, CANONICAL, 256, P("a"), P("a", None), P(None, None)),
    (CHANNEL, CANONICAL, 256, P(), P(None, None), P(None, None)),
    (CHANNEL, Layout(order=(-1, -2)), 256, P("a", "b"), P("b", "a"), P("b", None)),
    (ZERO_64, CANONICAL, 256, P(("a", "b"), None), P(("a", "b"), None), P(("a", "b"), None)),
    (ZERO_64, CANONICAL, 384, P(("a", "b"), None), P(("a", "b"), None), P(None, None)),
    (ZERO_64, CANONICAL, 576, P("a", "b"), P("a", "b"), P(None, "b")),
    (ZERO_64, Layout(packed=64), 256, P("a", "b"), P("a", "b"), P("a", "b")),
    (SCHEMES["int8 block"], CANONICAL, 512, P("a", "b"), P("a", "b"), P("a", None)),
    (SCHEMES["int8 tensor"], CANONICAL, 256, P("a", "b"), P("a", "b"), P(None, None)),
]


@pytest.mark.parametrize("scheme, layout, rows, spec, codes, scale", SPECS)
def test_scales_follow_where_tile_boundaries_fall_on_shard_boundaries(
    scheme, layout, rows, spec, codes, scale
):
    q = _weight(scheme, layout, rows)
    specs = leaf_specs(q, spec, MESH)
    assert (specs.codes, specs.scale) == (codes, scale)
    assert specs.zero_point == (None if q.zero_point is None else scale)
    replicated = {a for a, c, s in zip(layout.permutation(2), codes, scale, strict=True) if c != s}
    assert replicated_axes(q, spec, MESH) == tuple(sorted(replicated))


def test_packed_bytes_never_straddle_shards():
    assert leaf_specs(_weight(layout=Layout(packed=32)), P(None, ("a", "b")), MESH)
    with pytest.raises(ValueError, match="4 shards of an axis of 128 codes would cut .* of 64"):
        leaf_specs(_weight(layout=Layout(packed=64)), P(None, ("a", "b")), MESH)


def _check_shards(q: QArray, expected: QArray, spec: P, mesh: Mesh):
    """Each device's codes, with the scales it holds, are its part of the weight."""
    np.testing.assert_array_equal(values(q), values(expected))
    specs = leaf_specs(q, spec, mesh)
    for leaf, wanted in zip(
        jax.tree.leaves(q), jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, wanted), leaf.ndim)


@pytest.mark.parametrize("layout", layouts(ZERO_64, first=256, last=128)[:5], ids=str)
@pytest.mark.parametrize("spec", [P("a"), P(None, "b"), P(("a", "b"))], ids=str)
def test_placing_and_constraining_give_the_same_shardings(layout: Layout, spec: P):
    if layout.packed == 128 and spec == P(None, "b"):
        layout = Layout(packed=64)
    q = _weight(layout=layout)
    sharding = NamedSharding(MESH, spec)
    placed = place(q, sharding)
    _check_shards(placed, q, spec, MESH)
    _check_shards(jax.jit(lambda q: constrain(q, sharding))(q), q, spec, MESH)


def test_nine_groups_over_four_devices_leave_the_scales_whole():
    q = _weight(rows=576)
    assert q.scale.shape == (9, 128)
    sharding = NamedSharding(LINE, P("x"))
    placed = place(q, sharding)
    assert {shard.data.shape for shard in placed.codes.addressable_shards} == {(144, 128)}
    assert {shard.data.shape for shard in placed.scale.addressable_shards} == {(9, 128)}
    assert replicated_axes(q, P("x"), LINE) == (0,)
    back = jax.jit(dequantize, out_shardings=sharding)(placed)
    np.testing.assert_array_equal(back, dequantize(q))


@pytest.mark.parametrize("spec", [P("x"), P(None, "x")], ids=str)
@pytest.mark.parametrize("name", ["int8 channel", "int4 zero g64", "int8 block", "e4m3 channel"])
def test_quantizing_a_sharded_weight_gives_the_same_bits(name: str, spec: P):
    w = uneven(576 if name == "int4 zero g64" else 512, 512)
    quantize = jax.jit(lambda w: quantize_array(w, SCHEMES[name], contracted=(0,)))
    q = quantize(jax.device_put(w, NamedSharding(LINE, spec)))
    for leaf, expected in zip(jax.tree.leaves(q), jax.tree.leaves(quantize(w)), strict=True):
        np.testing.assert_array_equal(leaf, expected)


def test_memory_kind_is_kept():
    kind = jax.devices()[0].default_memory().kind
    sharding = NamedSharding(LINE, P("x"), memory_kind=kind)
    shardings = jax.tree.leaves(shardings_like(_weight(), sharding))
    assert {s.memory_kind for s in shardings} == {kind}


def test_a_placed_array_is_donated_and_updated_in_place():
    q = place(_weight(), NamedSharding(LINE, P(None, "x")))
    expected = values(q) * 2
    leaves = jax.tree.leaves(q)
    double = jax.jit(lambda q: jax.tree.map(lambda x: x, q), donate_argnums=0)
    scaled = double(q)
    assert all(leaf.is_deleted() for leaf in leaves)
    np.testing.assert_array_equal(values(scaled) * 2, expected)
    assert scaled.codes.sharding.is_equivalent_to(NamedSharding(LINE, P(None, "x")), 2)
    assert jnp.asarray(scaled.scale).shape == (4, 128)
