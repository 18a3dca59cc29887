"""Kernels on four devices: what they compute, what is exchanged, and when they are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from quantized import SCHEMES, uneven

from jaxquant.ops import dot_general, Refusal
from jaxquant.qarray import leaf_specs, place, quantize_array

NUMBERS = (((1,), (0,)), ((), ()))
LINE = Mesh(np.asarray(jax.devices()), ("x",))
SQUARE = Mesh(np.asarray(jax.devices()).reshape(2, 2), ("data", "x"))


def _operands(name: str = "int4 zero g64"):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 512)), jnp.float32)
    return x, quantize_array(uneven(512, 512, seed=1), SCHEMES[name], contracted=(0,))


def _product(mesh: Mesh, spec: P):
    sharding = NamedSharding(mesh.abstract_mesh, spec)

    def product(x, w):
        return dot_general(x, w, NUMBERS, sharding=sharding, backend="mosaic_tpu")

    return product


CUTS = [
    pytest.param(mesh, spec, reduces, id=f"{len(mesh.shape)} axes, {spec}")
    for mesh in (LINE, SQUARE)
    for spec, reduces in ((P("x"), 1), (P(None, "x"), 0), (P(), 0))
]


@pytest.mark.parametrize("mesh, spec, reduces", CUTS)
def test_each_device_multiplies_its_shard_and_only_sums_are_exchanged(mesh, spec, reduces):
    x, w = _operands()
    placed = place(w, NamedSharding(mesh, spec))
    product = jax.jit(_product(mesh, spec))
    expected = dot_general(x, w, NUMBERS, backend="reference")
    np.testing.assert_allclose(product(x, placed), expected, rtol=1e-4, atol=2e-3)
    text = product.lower(x, placed).compile().as_text()
    found = {kind: text.count(f" {kind}(") for kind in ("all-reduce", "all-gather", "all-to-all")}
    assert found == {"all-reduce": reduces, "all-gather": 0, "all-to-all": 0}


@pytest.mark.parametrize("mesh, spec, reduces", CUTS)
def test_the_gradient_is_the_outer_gradient_by_the_weight(mesh, spec, reduces):
    x, w = _operands()
    placed = place(w, NamedSharding(mesh, spec))
    product = _product(mesh, spec)
    got = jax.jit(jax.grad(lambda x, w: (product(x, w) ** 2).sum()))(x, placed)

    def reference(x):
        return (dot_general(x, w, NUMBERS, backend="reference") ** 2).sum()

    expected = np.asarray(jax.grad(reference)(x))
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_tiles_that_a_shard_would_cut_are_repeated():
    """9 groups of 64 on 4 devices: 144 rows each, tiles of 16."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 1152)), jnp.float32)
    w = quantize_array(uneven(1152, 128, seed=1), SCHEMES["int4 g32 bfloat16"], contracted=(0,))
    sharding = NamedSharding(LINE.abstract_mesh, P("x"))

    def product(x, w):
        return dot_general(x, w, NUMBERS, sharding=sharding, backend="mosaic_tpu")

    got = jax.jit(product)(x, place(w, NamedSharding(LINE, P("x"))))
    expected = dot_general(x, w, NUMBERS, backend="reference")
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-3)


def test_in_a_shard_map_of_the_user_the_kernel_is_called_as_it_is():
    x, w = _operands()
    specs = leaf_specs(w, P(None, "x"), LINE)

    def body(x, w):
        return dot_general(x, w, NUMBERS, backend="mosaic_tpu")

    mapped = jax.shard_map(
        body, mesh=LINE, in_specs=(P(), specs), out_specs=P(None, "x"), check_vma=False
    )
    expected = dot_general(x, w, NUMBERS, backend="reference")
    np.testing.assert_allclose(jax.jit(mapped)(x, w), expected, rtol=1e-4, atol=2e-3)


def test_weights_of_which_nothing_is_known_are_refused():
    x, w = _operands()
    with jax.set_mesh(LINE), pytest.raises(Refusal, match="4 devices, and how the weight lies"):
        jax.jit(lambda x, w: dot_general(x, w, NUMBERS, backend="mosaic_tpu"))(x, w)


def test_an_axis_that_devices_do_not_divide_is_refused():
    x = jnp.ones((8, 258))
    w = quantize_array(uneven(258, 512, seed=1), SCHEMES["int8 channel"], contracted=(0,))
    sharding = NamedSharding(LINE.abstract_mesh, P("x"))
    with pytest.raises(Refusal, match="4 devices do not divide axis 0 of 258"):
        dot_general(x, w, NUMBERS, sharding=sharding, backend="mosaic_tpu")
