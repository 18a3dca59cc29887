"""Scales that follow earlier steps, through models, transformations and devices."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxquant as jq
from jaxquant.intercept import PlanError
from jaxquant.recipes import NAMED
from jaxquant.training import Delayed, WayBack

NAMES = [f"fp8_train_{kind}" for kind in ("delayed", "current", "row", "block", "mx")]
DELAYED = NAMED["fp8_train_delayed"]


class Layers(nn.Module):
    """Three layers, by a loop or one by one; computed again on the way back if so said."""

    loop: bool
    again: bool

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Layer) if self.again else Layer
        if not self.loop:
            for i in range(3):
                x, _ = block(name=f"layer_{i}")(x, None)
            return x
        scan = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(name="layers")(x, None)[0]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.silu(nn.Dense(48, use_bias=False, name="up")(x))
        return x + nn.Dense(32, use_bias=False, name="down")(h), None


X = jax.random.normal(jax.random.key(0), (8, 6, 32))


def started(model, recipe=DELAYED, x=X):
    variables = model.init(jax.random.key(1), x)
    plan = jq.plan(model, variables, x, recipe=recipe)
    return plan, jq.start_training(model, variables, plan)


def loss_of(tmodel, x=X, size=1.0):
    return lambda v: size * jnp.square(tmodel.apply(v, x)).mean()


def site_states(tvariables):
    return tvariables["jaxquant"]["sites"]


@pytest.mark.parametrize(
    ("name", "again"), [*((name, False) for name in NAMES), (NAMES[0], True), (NAMES[3], True)]
)
def test_a_loop_over_layers_is_the_layers_one_by_one(name, again):
    loop, single = Layers(loop=True, again=again), Layers(loop=False, again=again)
    plan, stacked = started(loop, NAMED[name])
    apart, variables = started(single, NAMED[name])
    params = {
        f"layer_{i}": jax.tree.map(lambda x: x[i], stacked["params"]["layers"])  # noqa: B023
        for i in range(3)
    }
    variables = jq.start_training(single, {"params": params}, apart)
    for _ in range(2):
        one = jax.jit(jax.value_and_grad(loss_of(jq.simulate(loop, plan))))(stacked)
        other = jax.jit(jax.value_and_grad(loss_of(jq.simulate(single, apart))))(variables)
        # Sums in another order, which now and then are rounded to the next code.
        np.testing.assert_allclose(one[0], other[0], rtol=1e-4)
        stacked, gradients = jq.update_scales(stacked, one[1], plan)
        variables, layers = jq.update_scales(variables, other[1], apart)
        for i in range(3):
            for name in ("up", "down"):
                found = gradients["params"]["layers"][name]["kernel"][i]
                wanted = layers["params"][f"layer_{i}"][name]["kernel"]
                assert jnp.linalg.norm(found - wanted) < 1e-2 * jnp.linalg.norm(wanted)
    for site, own in stacked["jaxquant"].get("sites", {}).items():
        for i in range(3):
            for name, part in own.items():
                alone = site_states(variables)[site.replace("layers", f"layer_{i}")][name]
                np.testing.assert_allclose(part[i], alone, rtol=1e-2, atol=1e-12)


def test_what_a_step_saw_becomes_scales():
    model = nn.Dense(16, use_bias=False, name="lin")
    plan, tvariables = started(model)
    x = X.at[0, 0, 0].set(100.0)
    gradients = jax.grad(lambda v: (jq.simulate(model, plan).apply(v, x) * 3.0).sum())(tvariables)
    moved, left = jq.update_scales(tvariables, gradients, plan)
    (own,) = site_states(moved).values()
    np.testing.assert_allclose(own["scale"], [100.0 / 448], rtol=1e-6)
    np.testing.assert_allclose(own["gradient_scale"], [3.0 / 57344], rtol=1e-6)
    (held,) = moved["jaxquant"]["weights"].values()
    assert held["peaks"][0, 0, 0] == jnp.abs(tvariables["params"]["kernel"]).max()
    # What was seen is no gradient, and gone from what an optimizer gets.
    assert all(not np.asarray(x).any() for x in jax.tree.leaves(left["jaxquant"]))
    assert np.asarray(left["params"]["kernel"]).any()


def test_the_forward_rounds_with_scales_of_earlier_steps():
    """A sudden thousandfold is clipped once, and held after that."""
    model = nn.Dense(16, use_bias=False, name="lin")
    plan, tvariables = started(model)
    tmodel = jq.simulate(model, plan)

    def stepped(tvariables, x):
        y, pull = jax.vjp(lambda v: tmodel.apply(v, x), tvariables)
        return jq.update_scales(tvariables, pull(y)[0], plan)[0], y

    for _ in range(2):
        tvariables, _ = stepped(tvariables, X)
    exact = 1000 * model.apply({"params": tvariables["params"]}, X)
    tvariables, clipped = stepped(tvariables, 1000 * X)
    tvariables, after = stepped(tvariables, 1000 * X)
    size = np.linalg.norm(exact)
    assert np.isfinite(clipped).all()
    assert np.linalg.norm(clipped - exact) > 0.9 * size
    assert np.linalg.norm(after - exact) < 0.06 * size


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, 0.0])
def test_a_bad_batch_leaves_scales_as_they_were(bad):
    model = Layers(loop=True, again=True)
    plan, tvariables = started(model)
    tmodel = jq.simulate(model, plan)
    step = jax.jit(lambda v, x, s: jax.grad(lambda v: loss_of(tmodel, x, s)(v))(v))
    tvariables, _ = jq.update_scales(tvariables, step(tvariables, X, 1.0), plan)
    for x, size in ((X, bad), (X * bad, 1.0)):
        moved, _ = jq.update_scales(tvariables, step(tvariables, x, size), plan)
        for site, own in site_states(moved).items():
            assert np.isfinite(np.concatenate([np.ravel(x) for x in own.values()])).all()
            if size != 1.0:
                before = site_states(tvariables)[site]["gradient_scale"]
                np.testing.assert_array_equal(own["gradient_scale"], before)
        again, gradients = jq.update_scales(moved, step(moved, X, 1.0), plan)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((again, gradients)))


def test_four_devices_see_what_one_sees():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    model = Layers(loop=True, again=False)
    plan, tvariables = started(model)
    tmodel = jq.simulate(model, plan)
    step = jax.jit(lambda v, x: jax.grad(lambda v: loss_of(tmodel, x)(v))(v))
    one, _ = jq.update_scales(tvariables, step(tvariables, X), plan)
    spread = jax.device_put(X, NamedSharding(mesh, PartitionSpec("data")))
    four, _ = jq.update_scales(tvariables, step(tvariables, spread), plan)

    def by_hand(v, x):
        gradients = jax.grad(lambda v: loss_of(tmodel, x, 0.25)(v))(v)
        return jq.update_scales(v, gradients, plan, axis_name="data")[0]["jaxquant"]["sites"]

    mapped = jax.jit(
        jax.shard_map(
            by_hand,
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec("data")),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    )(tvariables, X)
    for site, own in site_states(one).items():
        for found in (site_states(four)[site], mapped[site]):
            for name, part in own.items():
                # The inputs of later layers are sums in another order.
                np.testing.assert_allclose(found[name], part, rtol=1e-5, atol=1e-12)


class Mapped(nn.Module):
    """A product that the model itself computes in a `shard_map`, or does not."""

    mesh: Any = None

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (32, 16))

        def product(kernel, x):
            return x @ kernel

        if self.mesh is not None:
            rows, whole = PartitionSpec("data"), PartitionSpec()
            product = jax.shard_map(product, mesh=self.mesh, in_specs=(whole, rows), out_specs=rows)
        return product(kernel, x)


def test_devices_of_a_model_that_maps_over_them_see_what_one_sees():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    seen = []
    for model in (Mapped(), Mapped(mesh)):
        with jax.set_mesh(mesh):
            plan, tvariables = started(model, x=X[:, 0])
            tmodel = jq.simulate(model, plan)
            step = jax.jit(jax.grad(loss_of(tmodel, X[:, 0])))
            moved, _ = jq.update_scales(tvariables, step(tvariables), plan)
        seen.append(site_states(moved)["kernel#dot"])
    for name in ("scale", "gradient_scale"):
        np.testing.assert_allclose(seen[0][name], seen[1][name], rtol=1e-6)


class Linear(nnx.Module):
    def __init__(self):
        self.lin = nnx.Linear(32, 16, use_bias=False, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.lin(x)


def test_nnx_has_the_same_state():
    model = Linear()
    variables = nnx.state(model)
    plan = jq.plan(model, variables, X, recipe=DELAYED)
    tvariables = jq.start_training(model, variables, plan)
    tmodel = jq.simulate(model, plan, tvariables)
    gradients = jax.grad(lambda v: jnp.square(tmodel.apply(v, X)).mean())(tvariables)
    moved, left = jq.update_scales(tvariables, gradients, plan)
    own = moved["jaxquant"]["sites"]["lin/kernel#dot"]
    np.testing.assert_allclose(own["scale"][...], [jnp.abs(X).max() / 448], rtol=1e-6)
    held = nnx.value_and_grad(
        lambda m: jnp.square(m(X)).mean(), argnums=nnx.DiffState(0, tmodel.wrt)
    )(tmodel)[1]
    held = tmodel.update_scales(held)
    assert jax.tree.structure(tmodel.variables) == jax.tree.structure(moved)
    for mine, other in zip(*map(jax.tree.leaves, (tmodel.variables, moved)), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-6)
    sums = [sorted(float(jnp.sum(x)) for x in jax.tree.leaves(each)) for each in (held, left)]
    np.testing.assert_allclose(*sums, rtol=1e-5)
    assert jax.tree.structure(moved) == jax.tree.structure(tvariables)
    assert jax.tree.structure(left) == jax.tree.structure(gradients)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_trained_is_computed_as_in_training(name):
    model = Layers(loop=True, again=False)
    plan, tvariables = started(model, NAMED[name])
    tmodel = jq.simulate(model, plan)
    gradients = jax.grad(loss_of(tmodel))(tvariables)
    tvariables, _ = jq.update_scales(tvariables, gradients, plan)
    converted = jq.convert(tvariables, plan)
    np.testing.assert_array_equal(
        jax.jit(jq.wrap(model, plan).apply)(converted, X), jax.jit(tmodel.apply)(tvariables, X)
    )


def test_another_plan_is_told():
    model = nn.Dense(16, use_bias=False, name="lin")
    plan, tvariables = started(model)
    other, _ = started(model, NAMED["fp8_train_current"])
    with pytest.raises(PlanError, match=plan.fingerprint):
        jq.update_scales(tvariables, tvariables, other)


def test_only_dots_have_their_way_back_on_codes():
    model = nn.Conv(8, (3, 3), name="conv")
    x = jnp.ones((1, 8, 8, 4))
    with pytest.raises(PlanError, match="way back"):
        started(model, NAMED["fp8_train_current"], x)


def test_gradients_alone_may_be_delayed():
    rule = DELAYED.rules[-1]
    current = NAMED["fp8_train_current"].rules[-1]
    back = WayBack(gradients=rule.training.way_back.gradients, scaling=Delayed(history=4))
    training = dataclasses.replace(current.training, way_back=back)
    recipe = jq.Recipe(name="mixed", rules=(dataclasses.replace(current, training=training),))
    model = nn.Dense(16, use_bias=False, name="lin")
    plan, tvariables = started(model, recipe)
    (own,) = site_states(tvariables).values()
    assert set(own) == {"seen", "gradient_scale", "gradient_peaks"}
    gradients = jax.grad(loss_of(jq.simulate(model, plan)))(tvariables)
    moved, _ = jq.update_scales(tvariables, gradients, plan)
    (own,) = site_states(moved).values()
    assert own["gradient_peaks"].shape == (1, 4) and own["gradient_scale"][0] < 1
    jq.wrap(model, plan).apply(jq.convert(moved, plan), X)
