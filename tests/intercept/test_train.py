"""Training with quantization in the loop: what is learned, trained and converted."""

import jax
import jax.numpy as jnp
import nnx_models
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

import jaxquant as jq
from jaxquant.intercept._simulate import rounding_of
from jaxquant.numerics import INT4, INT8, MinMax, NF4, UINT8
from jaxquant.qarray import PER_CHANNEL, PER_TENSOR, Scheme, Tile
from jaxquant.training import codes_of, LSQ, LSQPlus, MovingAverage, PACT, StraightThrough, Training

W4 = Scheme(values=INT4, tile=PER_CHANNEL)
A8 = Scheme(values=INT8, tile=PER_TENSOR)
LEARNED = Training(weights=LSQ(), activations=LSQ())
X = jax.random.normal(jax.random.key(7), (12, 16))


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(32)(x))
        return nn.Dense(5)(x)


def recipe(**rule):
    return jq.Recipe(name="trained", rules=(jq.Rule(match="*", **rule),))


def started(training=LEARNED, **rule):
    model = MLP()
    variables = model.init(jax.random.key(0), X)
    rule = {"weights": W4, "activations": A8, "static": True, "training": training, **rule}
    plan = jq.plan(model, variables, X, recipe=recipe(**rule))
    return model, plan, jq.start_training(model, variables, plan, [(X,)])


def test_what_is_learned_is_an_ordinary_collection():
    _, plan, tvariables = started()
    own = tvariables["jaxquant"]
    assert own["weights"]["Dense_0/kernel"]["scale"].shape == (1, 32)
    assert own["sites"]["Dense_1/kernel#dot"]["scale"].shape == (1,)
    kernel = tvariables["params"]["Dense_0"]["kernel"]
    np.testing.assert_allclose(
        own["weights"]["Dense_0/kernel"]["scale"][0], 2 * abs(kernel).mean(0) / 7**0.5, rtol=1e-6
    )
    # Of the first batch, all channels together.
    seen = 2 * abs(X).mean() / 127**0.5
    np.testing.assert_allclose(own["sites"]["Dense_0/kernel#dot"]["scale"], [seen], rtol=1e-6)
    assert "int4 channel (lsq) / int8 tensor (lsq)" in str(plan)


@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"training": Training(weights=LSQ())},
        {"training": None, "static": False, "activations": None},
        {"training": Training(weights=StraightThrough(clipped=True)), "static": False},
        {
            "training": Training(activations=PACT()),
            "activations": Scheme(values=UINT8, tile=PER_TENSOR),
        },
        {
            "training": Training(weights=LSQPlus(), activations=LSQPlus()),
            "weights": Scheme(values=UINT8, tile=PER_CHANNEL, zero_point=UINT8, range=MinMax()),
            "activations": Scheme(values=UINT8, tile=PER_TENSOR, zero_point=UINT8, range=MinMax()),
        },
    ],
    ids=["lsq", "weights alone learned", "straight through", "clipped", "pact", "offsets"],
)
def test_conversion_keeps_every_bit(rule):
    if rule.get("training") == Training(weights=LSQ()):
        rule = {**rule, "static": False}
    model, plan, tvariables = started(**rule)
    tmodel, qmodel = jq.simulate(model, plan), jq.wrap(model, plan)
    qvariables = jq.convert(tvariables, plan)
    found, expected = jax.jit(tmodel.apply)(tvariables, X), jax.jit(qmodel.apply)(qvariables, X)
    if plan.sites[0].activations is None:
        # Two orders of sums of floats, in two layers.
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    else:
        np.testing.assert_array_equal(found, expected)
    held = qvariables["params"]["Dense_0"]["kernel"]
    np.testing.assert_array_equal(held.codes, codes_in(tmodel, tvariables))


def codes_in(tmodel, tvariables):
    """The codes of the first kernel that a call makes."""
    kernel = tvariables["params"]["Dense_0"]["kernel"]
    learned = tvariables["jaxquant"].get("weights", {}).get("Dense_0/kernel", {})
    leaf = tmodel.plan.by_path["Dense_0/kernel"]
    return jax.jit(lambda w, own: codes_of(w, own, rounding_of(tmodel.plan, leaf)))(
        kernel, learned
    ).codes


@pytest.mark.parametrize("gradients", [None, A8], ids=["exact", "int8"])
def test_training_learns(gradients):
    training = Training(weights=LSQ(), activations=LSQ(), gradients=gradients)
    model, plan, tvariables = started(training)
    tmodel = jq.simulate(model, plan)
    labels = jnp.arange(12) % 5
    optimizer = optax.multi_transform(
        {"weights": optax.adamw(1e-2), "learned": optax.adam(1e-3)}, jq.training_labels
    )

    def loss(v):
        logits = tmodel.apply(v, X)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(v, state):
        value, g = jax.value_and_grad(loss)(v)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(g, state, v)
        return optax.apply_updates(v, updates), state, value

    before, state, v = tvariables, optimizer.init(tvariables), tvariables
    for _ in range(60):
        v, state, value = step(v, state)
    assert value < 0.3 * loss(before)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before["jaxquant"], v["jaxquant"])
    assert all(jax.tree.leaves(moved))
    jq.convert(v, plan)


def test_learned_leaves_are_told_from_weights():
    _, _, tvariables = started()
    labels = jq.training_labels(tvariables)
    assert set(jax.tree.leaves(labels["params"])) == {"weights"}
    assert set(jax.tree.leaves(labels["jaxquant"])) == {"learned"}


def test_nnx_models_are_trained_as_any_other():
    model = nnx_models.Tied(nnx.Rngs(0))
    ids = jnp.arange(12).reshape(3, 4) % 11
    plan = jq.plan(
        model,
        nnx.state(model),
        ids,
        recipe=recipe(weights=W4, activations=A8, static=True, training=LEARNED),
    )
    tvariables = jq.start_training(model, nnx.state(model), plan, [(ids,)])
    tmodel = jq.simulate(model, plan, tvariables)
    np.testing.assert_array_equal(tmodel(ids), tmodel.apply(tvariables, ids))
    optimizer = nnx.Optimizer(
        tmodel,
        optax.multi_transform(
            {"weights": optax.adamw(1e-2), "learned": optax.adam(1e-3)}, jq.training_labels
        ),
        wrt=tmodel.wrt,
    )

    def loss(tmodel):
        logits = tmodel(ids)
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids).mean()

    @nnx.jit
    def step(tmodel, optimizer):
        found, g = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, tmodel.wrt))(tmodel)
        with jax.numpy_dtype_promotion("standard"):
            optimizer.update(tmodel, g)
        return found

    losses = [float(step(tmodel, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    scale = tmodel.variables["jaxquant"]["weights"]["up/kernel"]["scale"]
    started_from = tvariables["jaxquant"]["weights"]["up/kernel"]["scale"]
    assert (scale.get_value() != started_from.get_value()).all()
    qmodel = jq.wrap(model, plan, jq.convert(tmodel.variables, plan))
    np.testing.assert_array_equal(jax.jit(qmodel.__call__)(ids), nnx.jit(tmodel)(ids))


def test_frozen_codes_are_told_from_what_is_trained():
    model = MLP()
    variables = model.init(jax.random.key(0), X)
    held = Scheme(values=NF4, tile=Tile(contracted=16))
    plan = jq.plan(model, variables, X, recipe=recipe(weights=held))
    qvariables, qmodel = jq.quantize(variables, plan), jq.wrap(model, plan)
    trainable, frozen = jq.partition(qvariables)
    assert trainable["params"]["Dense_0"]["kernel"] is None
    assert frozen["params"]["Dense_0"]["bias"] is None
    whole = jq.combine(trainable, frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(qvariables)
    g = jax.grad(lambda t: qmodel.apply(jq.combine(t, frozen), X).sum())(trainable)
    np.testing.assert_allclose(g["params"]["Dense_1"]["bias"], 12.0)
    only, _ = jq.partition(qvariables, match="Dense_1/*")
    assert (
        only["params"]["Dense_0"]["bias"] is None and only["params"]["Dense_1"]["bias"] is not None
    )


def test_what_cannot_be_started():
    model = MLP()
    variables = model.init(jax.random.key(0), X)
    plan = jq.plan(
        model,
        variables,
        X,
        recipe=recipe(weights=W4, activations=A8, static=True, training=LEARNED),
    )
    with pytest.raises(ValueError, match="no batches"):
        jq.start_training(model, variables, plan)
    broken = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), variables)
    with pytest.raises(ValueError, match=r"Dense_0/kernel holds NaN or infinity, so that no scale"):
        jq.start_training(model, broken, plan, [(X,)])


def test_variables_of_another_plan_are_refused():
    model, plan, tvariables = started()
    other = jq.plan(model, model.init(jax.random.key(0), X), X, recipe=recipe(weights=W4))
    with pytest.raises(jq.PlanError, match="quantized by the plan"):
        jq.simulate(model, other).apply(tvariables, X)
    with pytest.raises(jq.PlanError, match="not quantized"):
        jq.simulate(model, plan).apply(model.init(jax.random.key(0), X), X)


def test_codes_are_not_trained():
    model, plan, tvariables = started()
    qvariables = jq.convert(tvariables, plan)
    for refused in (
        lambda: jq.start_training(model, qvariables, plan),
        lambda: jq.simulate(model, plan).apply(qvariables, X),
        lambda: jq.convert(qvariables, plan),
    ):
        with pytest.raises(jq.PlanError, match="Dense_0/kernel is held as codes, which have no gr"):
            refused()


@pytest.mark.parametrize("value", [0.0, -0.1, np.nan])
@pytest.mark.parametrize("where", ["weights", "sites"])
def test_a_scale_that_is_not_positive_is_named(where, value):
    _, plan, tvariables = started()
    name, parts = next(iter(tvariables["jaxquant"][where].items()))
    parts["scale"] = parts["scale"].at[..., 0].set(value)
    with pytest.raises(ValueError, match=f"The learned scale of {name} is .* has to be positive"):
        jq.convert(tvariables, plan)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"training": Training()}, "trains, but quantizes no weights"),
        (
            {"weights": W4, "training": Training(), "algorithm": jq.algorithms.HQQ()},
            "no longer change",
        ),
        ({"weights": W4, "training": Training(weights=LSQPlus())}, "has no zero point"),
    ],
)
def test_rules_that_mean_nothing(rule, said):
    with pytest.raises(ValueError, match=said):
        jq.Rule(match="*", **rule)


def test_a_warm_up_goes_from_float_to_quantized():
    model, plan, tvariables = started()
    tmodel = jq.simulate(model, plan)
    plain = {"params": tvariables["params"]}
    results = jax.jit(lambda s: tmodel.apply(tvariables, X, strength=s))
    np.testing.assert_allclose(results(0.0), model.apply(plain, X), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(results(1.0), tmodel.apply(tvariables, X), rtol=1e-5, atol=1e-5)
    half = abs(results(0.5) - results(0.0)).mean()
    assert 0 < half < abs(results(1.0) - results(0.0)).mean()
    g = jax.grad(lambda v: tmodel.apply(v, X, strength=0.0).sum())(tvariables)
    expected = jax.grad(lambda v: model.apply(v, X).sum())(plain)
    # Where nothing is clipped: the estimator has its say already.
    bias = g["params"]["Dense_1"]["bias"]
    np.testing.assert_allclose(bias, expected["params"]["Dense_1"]["bias"])


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        def layer(module, x, _):
            return nn.tanh(module(x)), None

        scan = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(nn.Dense(16), x, None)[0]


MOVING = Training(activations=MovingAverage(decay=0.75))


@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "with zero points"])
def test_ranges_that_are_averages_move_where_the_collection_is_mutable(zero):
    scheme = A8
    if zero:
        scheme = Scheme(values=UINT8, tile=PER_TENSOR, zero_point=UINT8, range=MinMax())
    model = Scanned()
    variables = model.init(jax.random.key(0), X)
    rule = recipe(weights=W4, activations=scheme, static=True, training=MOVING)
    plan = jq.plan(model, variables, X, recipe=rule)
    before = jq.start_training(model, variables, plan, [(X,)])
    (site,) = before["jaxquant"]["sites"]
    old = before["jaxquant"]["sites"][site]
    assert old["low"].shape == (3, 1) and float(old["high"][0, 0]) == float(X.max())
    tmodel = jq.simulate(model, plan)
    apply = jax.jit(lambda v, x: tmodel.apply(v, x, mutable=["jaxquant"]))
    y, written = apply(before, 3 * X)
    np.testing.assert_array_equal(y, jax.jit(tmodel.apply)(before, 3 * X))
    new = written["jaxquant"]["sites"][site]
    for end, most in (("low", X.min()), ("high", X.max())):
        np.testing.assert_allclose(new[end][0], 0.75 * most + 0.25 * 3 * most, rtol=1e-6)
    after = {**before, **written}
    assert jax.tree.structure(after) == jax.tree.structure(before)
    qvariables, qmodel = jq.convert(after, plan), jq.wrap(model, plan)
    np.testing.assert_array_equal(
        jax.jit(tmodel.apply)(after, X), jax.jit(qmodel.apply)(qvariables, X)
    )
    g = jax.grad(lambda v: tmodel.apply(v, X).sum())(after)
    assert all((x == 0).all() for x in jax.tree.leaves(g["jaxquant"]))


def test_an_nnx_model_moves_its_ranges_itself():
    model = nnx_models.Tied(nnx.Rngs(0))
    ids = jnp.arange(12).reshape(3, 4) % 11
    rule = recipe(weights=W4, activations=A8, static=True, training=MOVING)
    plan = jq.plan(model, nnx.state(model), ids, recipe=rule)
    tvariables = jq.start_training(model, nnx.state(model), plan, [(ids[:1],)])
    tmodel = jq.simulate(model, plan, tvariables)

    def high():
        sites = tmodel.variables["jaxquant"]["sites"]
        return float(sites["up/kernel#dot"]["high"].get_value()[0])

    before = high()
    nnx.jit(lambda m: m(ids))(tmodel)
    most = float(model.embed(ids).max())
    assert high() == pytest.approx(0.75 * before + 0.25 * most)


class Attending(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k = nn.Dense(16, name="q")(x), nn.Dense(16, name="k")(x)
        return jnp.einsum("nd,md->nm", q, k)


def test_products_of_activations_are_trained_through():
    model = Attending()
    variables = model.init(jax.random.key(0), X)
    rules = (
        jq.Rule(match="*#product*", products=Scheme(values=INT8, tile=PER_CHANNEL)),
        jq.Rule(match="*", weights=Scheme(values=INT8, tile=PER_CHANNEL)),
    )
    plan = jq.plan(model, variables, X, recipe=jq.Recipe(name="products", rules=rules))
    assert any(site.op == "product" and site.activations for site in plan.sites)
    tvariables, tmodel = jq.start_training(model, variables, plan), jq.simulate(model, plan)
    found = jax.jit(tmodel.apply)(tvariables, X)
    expected = jq.wrap(model, plan).apply(jq.convert(tvariables, plan), X)
    # A code may turn where floats are added up in another order: one gap of each side.
    assert abs(found - expected).max() < 0.02 * abs(expected).max()
    g = jax.grad(lambda v: jnp.square(tmodel.apply(v, X)).sum())(tvariables)["params"]
    plain = jax.grad(lambda v: jnp.square(model.apply(v, X)).sum())(variables)["params"]
    for a, b in zip(jax.tree.leaves(g), jax.tree.leaves(plain), strict=True):
        assert jnp.vdot(a, b) > 0.99 * jnp.linalg.norm(a) * jnp.linalg.norm(b)


def test_plans_for_weights_that_no_longer_change_are_refused():
    rule = {
        "training": None,
        "outliers": jq.Outliers(),
        "activations": Scheme(values=INT8, tile=PER_CHANNEL),
    }
    model = MLP()
    variables = model.init(jax.random.key(0), X)
    made = recipe(weights=Scheme(values=INT8, tile=PER_CHANNEL), **rule)
    plan = jq.plan(model, variables, X, recipe=made)
    with pytest.raises(jq.PlanError, match="Dense_0/kernel#dot keeps outliers apart"):
        jq.simulate(model, plan)


def test_ranges_that_are_not_learned_are_those_of_calibration():
    model, training = MLP(), Training(weights=LSQ())
    variables = model.init(jax.random.key(0), X)
    fixed = recipe(weights=W4, activations=A8, static=True, training=training)
    plan = jq.plan(model, variables, X, recipe=fixed)
    with pytest.raises(ValueError, match="Dense_0/kernel#dot has static activations"):
        jq.start_training(model, variables, plan)
    calibrated = jq.calibrate(model, variables, [(X,)], plan).qvariables
    tvariables = jq.start_training(model, variables, plan, calibrated=calibrated)
    site = "Dense_1/kernel#dot"
    ours, theirs = (v["jaxquant"]["sites"][site]["scale"] for v in (tvariables, calibrated))
    np.testing.assert_array_equal(ours, theirs)
    found = jax.jit(jq.simulate(model, plan).apply)(tvariables, X)
    qvariables = jq.convert(tvariables, plan)
    np.testing.assert_array_equal(found, jax.jit(jq.wrap(model, plan).apply)(qvariables, X))
