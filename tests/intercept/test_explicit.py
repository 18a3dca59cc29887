"""Explicit meshes: results have the values and the types of the plain model's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import Applied, assert_close, W8, weight
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from quantized import values

import jaxquant as jq
from jaxquant.intercept._explicit import explicit_sharding

MESH = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
K, N = 16, 12
GROUPS = dataclasses.replace(W8, tile=jq.Tile(contracted=4))
SCHEMES = {"channel": (W8, None), "groups": (GROUPS, None), "rounded": (GROUPS, GROUPS)}


def _put(x, *spec):
    return jax.device_put(x, NamedSharding(MESH, P(*spec)))


def dot(x, w):
    return x @ w


def summed(x, w):
    return jnp.einsum("nk,kd->nd", x, w, out_sharding=NamedSharding(MESH, P("x", None)))


def joined(x, w):
    return x @ jnp.concatenate([w[:4], w[4:]], axis=0)


def looked_up(x, w):
    ids = jnp.argmax(x, axis=1)
    return w.at[ids].get(out_sharding=NamedSharding(MESH, P(None, "y")))


def scanned(x, w):
    def layer(x, w):
        return jnp.tanh(x @ w / 64), None

    return jax.lax.scan(layer, x, w)[0]


# Function, shape of the weight, its spec, that of the rows.
CASES = {
    "columns": (dot, (K, N), (None, "y"), ("x", None)),
    "rows": (summed, (K, N), ("y", None), ("x", "y")),
    "joined": (joined, (K, N), (None, "y"), ("x", None)),
    "lookup": (looked_up, (K, N), (None, "y"), (None, None)),
    "layers": (scanned, (3, K, K), (None, None, None), (("x", "y"), None)),
}


def _setting(name, scheme):
    function, shape, spec, rows = CASES[name]
    weights, activations = SCHEMES[scheme]
    rule = jq.Rule(match="*", weights=weights, activations=activations)
    model, x = Applied(function, shape), _put(jnp.sin(jnp.arange(8.0 * K)).reshape(8, K), *rows)
    variables = {"params": {"w": _put(weight(*shape) / 7, *spec)}}
    plan = jq.plan(model, variables, x, recipe=jq.Recipe(name="r", rules=(rule,)))
    qvariables = jq.quantize(variables, plan)
    q = qvariables["params"]["w"]
    plain = {"params": {"w": _put(jnp.asarray(values(q).astype(np.float32)), *spec)}}
    return model, plan, qvariables, plain, x


@pytest.mark.parametrize("context", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", CASES)
def test_values_and_types_are_those_of_the_plain_model(name, scheme, context):
    model, plan, qvariables, plain, x = _setting(name, scheme)
    if context:
        with jax.set_mesh(MESH):
            want = jax.jit(model.apply)(plain, x)
            got = jax.jit(jq.wrap(model, plan).apply)(qvariables, x)
    else:
        want = jax.jit(model.apply)(plain, x)
        got = jax.jit(jq.wrap(model, plan).apply)(qvariables, x)
    assert jax.typeof(got) == jax.typeof(want)
    if scheme == "rounded" and name != "lookup":
        assert 0 < jnp.linalg.norm(got - want) < 0.05 * jnp.linalg.norm(want)
    else:
        assert_close(got, want)


@pytest.mark.parametrize("scheme", ["channel", "groups"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "lookup"])
def test_gradients_too(name, scheme):
    model, plan, qvariables, plain, x = _setting(name, scheme)

    def gradient(apply, variables):
        return jax.jit(jax.grad(lambda x: jnp.square(apply(variables, x)).sum()))(x)

    with jax.set_mesh(MESH):
        want = gradient(model.apply, plain)
        got = gradient(jq.wrap(model, plan).apply, qvariables)
    assert jax.typeof(got) == jax.typeof(want)
    assert_close(got, want)


def test_codes_and_scales_are_sharded_as_the_weight():
    w = _put(weight(K, N), "x", "y")
    rule = jq.Rule(match="*", weights=GROUPS)
    model, x = Applied(dot, (K, N)), jnp.ones((2, K))
    for shape in (w, jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding)):
        recipe = jq.Recipe(name="r", rules=(rule,))
        plan = jq.plan(model, {"params": {"w": shape}}, x, recipe=recipe)
    q = jq.quantize({"params": {"w": w}}, plan)["params"]["w"]
    assert jax.typeof(q.codes).sharding.spec == jax.typeof(q.scale).sharding.spec == P("x", "y")
    assert explicit_sharding(q.T).spec == P("y", "x")
    assert explicit_sharding(jnp.ones(3)) is None
    alone = jq.quantize_array(weight(K, N), GROUPS, contracted=(0,))
    np.testing.assert_array_equal(values(q), values(alone))


def test_where_it_is_needed_as_an_array_it_has_the_weights_type():
    def function(x, w):
        return x @ w, jnp.square(w)

    rule = jq.Rule(match="*", weights=GROUPS, elsewhere="dequantize")
    model, x = Applied(function, (K, N)), _put(jnp.ones((4, K)), None, None)
    variables = {"params": {"w": _put(weight(K, N), None, "y")}}
    with jax.set_mesh(MESH):
        plan = jq.plan(model, variables, x, recipe=jq.Recipe(name="r", rules=(rule,)))
        qvariables = jq.quantize(variables, plan)
        got = jax.jit(jq.wrap(model, plan).apply)(qvariables, x)[1]
    assert jax.typeof(got).sharding.spec == P(None, "y")
    np.testing.assert_allclose(got, values(qvariables["params"]["w"]) ** 2, rtol=2**-22)
