"""Plan, wrap and observe, on arguments and trees of every kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import Applied, assert_close, dequantized, inputs, LOWEST, W8A8, W8A16, weight, wrapped
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from linen_models import D, Scanned

import jaxquant as jq

MESH = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
X = jax.random.normal(jax.random.key(2), (4, D))


def test_shapes_suffice_for_variables_and_arguments():
    model = Scanned()
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)
    plan = jq.plan(model, shapes, jax.ShapeDtypeStruct(X.shape, X.dtype), recipe=W8A16)
    assert plan == jq.plan(model, model.init(jax.random.key(0), X), X, recipe=W8A16)


def test_a_quantized_tree_is_not_planned_again():
    model, variables = Applied(jnp.matmul, (D, D)), {"params": {"w": weight(D, D)}}
    plan = jq.plan(model, variables, X, recipe=W8A16)
    with pytest.raises(jq.PlanError, match="w is quantized already"):
        jq.plan(model, jq.quantize(variables, plan), X, recipe=W8A16)


def test_only_flax_modules_are_models():
    for call in (jq.plan, jq.observe):
        with pytest.raises(TypeError, match="A model is a flax.linen.Module or a flax.nnx.Module"):
            call(lambda x: x, {}, [], **({"recipe": W8A16} if call is jq.plan else {}))


def test_variables_of_another_plan_are_refused():
    model, variables = Applied(jnp.matmul, (D, D)), {"params": {"w": weight(D, D)}}
    a, b = (jq.plan(model, variables, X, recipe=r) for r in (W8A16, W8A8))
    with pytest.raises(jq.PlanError, match=f"{a.fingerprint}.*{b.fingerprint}"):
        jq.wrap(model, b).apply(jq.quantize(variables, a), X)
    with pytest.raises(jq.PlanError, match="not quantized"):
        jq.wrap(model, b).apply(variables, X)


def test_batches_are_tuples_and_there_is_one_at_least():
    model, variables = Applied(jnp.matmul, (D, D)), {"params": {"w": weight(D, D)}}
    with pytest.raises(TypeError, match="write \\(tokens,\\)"):
        jq.observe(model, variables, [X])
    with pytest.raises(ValueError, match="no batches"):
        jq.observe(model, variables, [])


def test_vmap_over_inputs_alone():
    model, variables = Applied(lambda x, w: x @ w, (D, D)), {"params": {"w": weight(D, D)}}
    plan = jq.plan(model, variables, inputs(D), recipe=W8A16)
    qvariables, xs = jq.quantize(variables, plan), inputs(3, 5, D)
    for backend in ("xla", None):
        apply = jq.wrap(model, plan, backend=backend).apply
        got = jax.jit(jax.vmap(jax.vmap(lambda x: apply(qvariables, x))))(xs)  # noqa: B023
        np.testing.assert_allclose(got, xs @ variables["params"]["w"], rtol=0, atol=1e-3)


def test_python_numbers_keep_their_weak_type_and_may_steer_python():
    def function(arguments, w):
        x, scale, count = arguments
        for _ in range(count):
            x = x * scale
        return x.astype(jnp.bfloat16) * scale @ w.astype(jnp.bfloat16)

    model, variables = Applied(function, (D, D)), {"params": {"w": weight(D, D)}}
    arguments = (inputs(4, D), 0.5, 2)
    plan = jq.plan(model, variables, arguments, recipe=W8A16)
    qvariables = jq.quantize(variables, plan)
    want = model.apply(dequantized(qvariables), arguments)
    got = wrapped(model, plan).apply(qvariables, arguments)
    assert got.dtype == want.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, want)


def test_donated_arguments_are_as_usable_as_without_us():
    model, variables = Applied(lambda x, w: x @ w, (D, D)), {"params": {"w": weight(D, D)}}
    plan = jq.plan(model, variables, inputs(D, D), recipe=W8A16)
    qvariables = jq.quantize(variables, plan)
    step = jax.jit(wrapped(model, plan).apply, donate_argnums=1)
    x = inputs(D, D)
    for _ in range(2):
        want = jnp.clip(x, -4, 4) @ variables["params"]["w"]
        x = step(qvariables, jnp.clip(x, -4, 4))
        np.testing.assert_array_equal(x, want)


class Sharded(nn.Module):
    """A projection up, sharded by columns, and one down, by rows."""

    constrain: bool = False
    k: int = 16

    @nn.compact
    def __call__(self, x):
        up = self.param("up", nn.initializers.zeros, (self.k, 32))
        down = self.param("down", nn.initializers.zeros, (32, self.k))
        if self.constrain:
            up = jax.lax.with_sharding_constraint(up, NamedSharding(MESH, P(None, "d")))
            down = jax.lax.with_sharding_constraint(down, NamedSharding(MESH, P("d", None)))
        return jnp.clip(x @ up, -4, 4) @ down


SHARDINGS = {
    "params": {"up": NamedSharding(MESH, P(None, "d")), "down": NamedSharding(MESH, P("d"))}
}


def _sharded(scheme, k=16):
    variables = {"params": {"up": weight(k, 32), "down": weight(32, k, seed=5)}}
    return jax.device_put(variables, SHARDINGS), jq.Recipe(
        name="r", rules=(jq.Rule(match="*", weights=scheme),)
    )


@pytest.mark.parametrize("constrain", [False, True])
@pytest.mark.parametrize("group", [None, 8, 16], ids=lambda g: f"g{g}")
def test_codes_follow_the_weight_and_results_do_not_depend_on_sharding(group, constrain):
    scheme = jq.Scheme(values=jq.INT8, tile=jq.Tile(contracted=group), range=LOWEST)
    variables, recipe = _sharded(scheme)
    model, x = Sharded(constrain=constrain), inputs(8, 16)
    plan = jq.plan(model, variables, x, recipe=recipe)
    qvariables = jq.quantize(variables, plan)
    up, down = qvariables["params"]["up"], qvariables["params"]["down"]
    assert up.codes.sharding.spec == P(None, "d")
    assert down.codes.sharding.spec[0] == "d"
    assert up.scale.sharding.spec == P(None, "d")
    # Of 32 rows each device holds 8: groups of 8 follow, wider ones are held by all.
    follows = group == 8
    assert (down.scale.sharding.spec[0] == "d") == follows
    assert plan.by_path["down"].replicated == (() if follows else (0,))
    assert plan.by_path["down"].spec == ("d", "")
    assert ("scales replicated on axis 0" in str(plan)) == (not follows)
    apply = jax.jit(wrapped(model, plan).apply)
    here = jax.device_put(qvariables, jax.devices()[0])
    plain = wrapped(Sharded(), plan)
    np.testing.assert_array_equal(apply(qvariables, x), jax.jit(plain.apply)(here, x))


def test_nine_groups_over_four_devices_are_named_in_the_plan():
    scheme = jq.Scheme(values=jq.INT8, tile=jq.Tile(contracted=64), range=LOWEST)
    w = jax.device_put(weight(576, 8), NamedSharding(MESH, P("d")))
    model, variables, x = Applied(jnp.matmul, w.shape), {"params": {"w": w}}, inputs(4, 576)
    recipe = jq.Recipe(name="r", rules=(jq.Rule(match="*", weights=scheme),))
    plan = jq.plan(model, variables, x, recipe=recipe)
    assert "w: scales replicated on axis 0, which d shards: tiles of 64" in str(plan)
    q = jq.quantize(variables, plan)["params"]["w"]
    assert q.codes.sharding.spec[0] == "d" and q.codes.addressable_shards[0].data.shape == (144, 8)
    assert q.scale.sharding.is_fully_replicated and q.scale.shape == (9, 8)
    got = jax.jit(wrapped(model, plan).apply)(jq.quantize(variables, plan), x)
    np.testing.assert_array_equal(got, x @ jq.dequantize(q))


def test_shardings_may_be_given_before_there_are_arrays():
    scheme = jq.Scheme(values=jq.INT8, tile=jq.Tile(contracted=16), range=LOWEST)
    variables, recipe = _sharded(scheme)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), variables
    )
    x = inputs(8, 16)
    for plan in (
        jq.plan(Sharded(), shapes, x, recipe=recipe, sharding=SHARDINGS),
        jq.plan(Sharded(), placed, x, recipe=recipe),
    ):
        assert plan.by_path["down"].replicated == (0,)
        assert plan == jq.plan(Sharded(), shapes, x, recipe=recipe)


def test_an_ordinary_model_has_no_shardings_in_its_plan():
    plan = jq.plan(Scanned(), Scanned().init(jax.random.key(0), X), X, recipe=W8A16)
    assert {leaf.spec for leaf in plan.leaves} == {()}
    assert_close(1, 1)
