import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.calibrate._roots import assembled, root_array, RootPlan, stack_qarrays
from jaxquant.intercept import LeafPlan, Root

G = jq.Scheme(values=jq.INT4, tile=jq.Tile(contracted=8))
RAGGED = jq.Scheme(values=jq.INT4, tile=jq.Tile(contracted=6, ragged=True))
ZERO = jq.Scheme(
    values=jq.formats.UINT4,
    tile=jq.Tile(contracted=8),
    range=jq.MinMax(),
    zero_point=jq.formats.UINT4,
)
SCHEMES = {"int4": G, "ragged": RAGGED, "zero": ZERO, "nvfp4": jq.schemes.NVFP4}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1), (0, 3)])
def test_slices_quantized_alone_make_the_parameter_quantized_as_a_stack(name, axes):
    rest = [16, 4]
    shape = list(rest)
    for axis in axes:
        shape.insert(axis, 3)
    (contracted,) = [i for i, n in enumerate(shape) if n == 16]
    w = jax.random.normal(jax.random.key(1), tuple(shape))
    leaf = LeafPlan(
        path="w",
        shape=tuple(shape),
        dtype="float32",
        scheme=SCHEMES[name],
        contracted=(contracted,),
        stack=axes,
        elsewhere="error",
    )
    wanted = jq.quantize_array(w, leaf.scheme, contracted=leaf.contracted, stack=leaf.stack)
    slices = {}
    for index in np.ndindex(*(3,) * len(axes)):
        root = Root(path="w", steps=tuple(zip(axes, map(int, index), strict=True)))
        planned = RootPlan(leaf=leaf, root=root)
        part = root_array({"w": w}, root)
        assert part.shape == planned.shape
        slices[root] = jq.quantize_array(
            part, leaf.scheme, contracted=planned.contracted, stack=planned.stack
        )
    got = assembled(slices, leaf)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_missing_layer_is_an_error():
    w = jnp.ones((3, 8, 2))
    leaf = LeafPlan(
        path="w",
        shape=w.shape,
        dtype="float32",
        scheme=G,
        contracted=(1,),
        stack=(0,),
        elsewhere="error",
    )
    part = jq.quantize_array(w[0], G, contracted=(0,))
    slices = {Root(path="w", steps=((0, i),)): part for i in range(2)}
    with pytest.raises(ValueError, match="shape \\(3, 8, 2\\).*make \\(2, 8, 2\\)"):
        assembled(slices, leaf)


def test_experts_stay_stacks_within_a_slice():
    leaf = LeafPlan(
        path="w",
        shape=(5, 3, 8, 2),
        dtype="float32",
        scheme=G,
        contracted=(2,),
        stack=(0, 1),
        elsewhere="error",
    )
    planned = RootPlan(leaf=leaf, root=Root(path="w", steps=((0, 4),)))
    assert (planned.shape, planned.contracted, planned.stack) == ((3, 8, 2), (1,), (0,))


def test_numpy_parameters_are_read_slice_by_slice():
    w = np.arange(24.0, dtype=np.float32).reshape(2, 3, 4)
    part = root_array({"w": w}, Root(path="w", steps=((0, 1), (2, 3))))
    np.testing.assert_array_equal(part, w[1, :, 3])


def test_stacking_keeps_bits():
    q = jq.quantize_array(jnp.ones((8, 2)), G, contracted=(0,))
    stacked = stack_qarrays([q, q], 1)
    assert stacked.shape == (8, 2, 2)
    np.testing.assert_array_equal(jq.dequantize(stacked)[:, 1], jq.dequantize(q))
