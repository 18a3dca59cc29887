"""Prepared variables are the same values in another order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxquant as jq
from jaxquant.intercept import leaf_paths
from jaxquant.qarray import CANONICAL

INT8 = jq.Scheme(values=jq.INT8, tile=jq.PER_CHANNEL)
INT4 = jq.Scheme(values=jq.INT4, tile=jq.Tile(contracted=16))


class Model(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(20, 32, name="embed")
        x = embed(ids)
        stacked = nn.scan(Layer, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)
        x, _ = stacked(name="layers")(x, None)
        return embed.attend(nn.DenseGeneral(32, axis=(-2, -1), name="out")(x.reshape(2, 3, 4, 8)))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(32, name="dense")(x), None


def _model(scheme):
    ids = jnp.asarray([[1, 2, 3], [4, 5, 19]])
    model = Model()
    variables = model.init(jax.random.key(0), ids)
    recipe = jq.Recipe(name="all", rules=(jq.Rule(match="*", weights=scheme),))
    plan = jq.plan(model, variables, ids, recipe=recipe)
    return model, plan, jq.quantize(variables, plan), ids


def _by_path(variables):
    leaves = jax.tree.leaves(variables, is_leaf=lambda x: isinstance(x, jq.QArray))
    pairs = zip(leaf_paths(variables), leaves, strict=True)
    return {path: leaf for path, leaf in pairs if isinstance(leaf, jq.QArray)}


@pytest.mark.parametrize("scheme", [INT8, INT4], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_preparing_changes_no_value_and_hardly_a_result(scheme, packed):
    model, plan, qvariables, ids = _model(scheme)
    prepared = jq.prepare(qvariables, plan, packed=packed)
    before, after = _by_path(qvariables), _by_path(prepared)
    assert before.keys() == after.keys() == plan.by_path.keys()
    for path, q in after.items():
        np.testing.assert_array_equal(jq.dequantize(q), jq.dequantize(before[path]))
    run = jax.jit(jq.wrap(model, plan).apply)
    expected, got = run(qvariables, ids), run(prepared, ids)
    # Both sum the same products in float32, in another order.
    np.testing.assert_allclose(got, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_the_contracted_axes_come_to_lie_last_and_stack_axes_first():
    _, plan, qvariables, _ = _model(INT8)
    prepared = _by_path(jq.prepare(qvariables, plan, backend="xla_cpu"))
    assert prepared["layers/dense/kernel"].shape == (32, 3, 32)
    assert prepared["layers/dense/kernel"].layout.order == (-2, -1, -3)
    assert prepared["out/kernel"].codes.shape == (32, 4, 8)
    assert prepared["embed/embedding"].layout == CANONICAL


def test_int4_takes_a_byte_a_code_or_half_of_one_when_packed():
    _, plan, qvariables, _ = _model(INT4)
    wide = _by_path(jq.prepare(qvariables, plan, backend="xla_cpu"))["embed/embedding"]
    packed = _by_path(jq.prepare(qvariables, plan, packed=True))["embed/embedding"]
    assert (wide.codes.dtype, wide.codes.shape) == (jnp.int8, (20, 32))
    assert (packed.codes.dtype, packed.codes.shape) == (jnp.uint8, (20, 16))


def test_other_backends_read_the_canonical_layout():
    _, plan, qvariables, _ = _model(INT8)
    prepared = jq.prepare(jq.prepare(qvariables, plan), plan, backend="xla")
    assert {q.layout for q in _by_path(prepared).values()} == {CANONICAL}


def test_an_unknown_backend_is_an_error_that_lists_the_known_ones():
    _, plan, qvariables, _ = _model(INT8)
    with pytest.raises(ValueError, match="no backend named 'tpu'.*xla_cpu, xla, reference"):
        jq.prepare(qvariables, plan, backend="tpu")
