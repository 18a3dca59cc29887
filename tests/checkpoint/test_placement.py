"""Placements: one sharding, a function, or a mesh with patterns; and the parts of a QArray."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P, SingleDeviceSharding

from jaxquant.checkpoint._placement import assembled, part_shardings, placed_by
from jaxquant.numerics import BFLOAT16, INT4, INT8, MinMax
from jaxquant.qarray import abstract_qarray, Scheme, Tile

MESH = jax.make_mesh((4,), ("x",))


def test_every_kind_of_placement_is_a_function_of_the_path():
    one = SingleDeviceSharding(jax.devices()[1])
    assert placed_by(None)("a") is None
    assert placed_by(one)("a") is one
    assert placed_by(lambda path: one if path == "a" else None)("b") is None
    rules = placed_by((MESH, {"*/kernel": P("x"), "*": P()}))
    assert rules("a/kernel").spec == P("x")
    assert rules("a/bias").spec == P()


def test_a_path_that_no_pattern_matches_is_an_error():
    with pytest.raises(ValueError, match=r"No pattern of \['\*/kernel'\] matches a/bias"):
        placed_by((MESH, {"*/kernel": P()}))("a/bias")


def test_what_is_not_the_models_is_whole_on_each_device_of_a_mesh():
    path = "jaxquant/sites/a/kernel#dot/scale"
    whole = NamedSharding(MESH, P())
    one = SingleDeviceSharding(jax.devices()[1])
    assert placed_by((MESH, {"*/kernel": P("x")}))(path) == whole
    assert placed_by(NamedSharding(MESH, P("x")))(path) == whole
    assert placed_by(lambda path: NamedSharding(MESH, P("x")))(path) == whole
    assert placed_by(one)(path) is one and placed_by(None)(path) is None


def test_what_is_no_placement_is_an_error():
    with pytest.raises(TypeError):
        placed_by("x")


def shape_of(k: int, n: int, group: int):
    scheme = Scheme(
        values=INT4,
        tile=Tile(contracted=group),
        scale=BFLOAT16,
        range=MinMax(),
        zero_point=INT8,
    )
    return abstract_qarray((k, n), jnp.float32, scheme, contracted=(0,))


# Rows and group -> how the scales of a weight whose rows are cut in four are cut.
CUTS = [((64, 8, 16), P("x", None)), ((72, 8, 8), P(None, None)), ((64, 8, 64), P(None, None))]


@pytest.mark.parametrize("sizes, wanted", CUTS)
def test_codes_follow_the_weight_and_scales_as_their_tiles_allow(sizes, wanted):
    shape = shape_of(*sizes)
    parts = part_shardings("w", shape, NamedSharding(MESH, P("x", None)))
    assert parts["codes"].spec == P("x", None)
    assert parts["scale"].spec == parts["zero_point"].spec == wanted


def test_a_sharding_without_a_mesh_is_that_of_every_part():
    one = SingleDeviceSharding(jax.devices()[1])
    parts = part_shardings("w", shape_of(64, 8, 16), one)
    assert set(parts.values()) == {one}


def test_a_shape_that_cannot_be_cut_is_named():
    with pytest.raises(ValueError, match=r"layers/w, shape \(66, 8\) .*cannot be placed"):
        part_shardings("layers/w", shape_of(66, 8, 33), NamedSharding(MESH, P("x")))
    plain = jax.ShapeDtypeStruct((6,), jnp.float32)
    with pytest.raises(ValueError, match=r"norm, shape \(6,\), cannot be placed"):
        part_shardings("norm", plain, NamedSharding(MESH, P("x")))


def test_parts_are_put_together():
    shape = shape_of(64, 8, 16)
    q = assembled(shape, {"codes": 1, "scale": 2, "zero_point": 3})
    assert (q.codes, q.scale, q.zero_point, q.scheme) == (1, 2, 3, shape.scheme)
    assert assembled(jax.ShapeDtypeStruct((2,), jnp.float32), {"plain": 5}) == 5
