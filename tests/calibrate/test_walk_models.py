"""Models whose walk is out of the ordinary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxquant as jq
from jaxquant.algorithms import AWQ, GPTQ, HQQ, Order, RangeSearch, SmoothQuant
from jaxquant.calibrate import calibrate
from jaxquant.intercept._variables import states_of
from jaxquant.ops import Outliers, OutlierWeights

W4 = jq.Scheme(values=jq.INT4, tile=jq.Tile(contracted=4))
W8 = jq.Scheme(values=jq.INT8, tile=jq.PER_CHANNEL)
TENSOR = jq.Scheme(values=jq.INT8, tile=jq.PER_TENSOR)
TILES = jq.Scheme(values=jq.INT8, tile=jq.Tile(contracted=4, kept=None))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def run(model, batches, *rules, variables=None):
    variables = model.init(jax.random.key(0), *batches[0]) if variables is None else variables
    rules = (*rules, jq.Rule(match="*", optional=True))
    plan = jq.plan(model, variables, *batches[0], recipe=jq.Recipe(name="r", rules=rules))
    return plan, calibrate(model, variables, batches, plan)


class Scaled(nn.Module):
    """Multiplies by a constant that depends on the length, and adds one of that shape."""

    @nn.compact
    def __call__(self, x):
        length = x.shape[1]
        places = np.zeros((1, length, 8), np.float32)
        return nn.Dense(8, name="d")(x * np.full((1, 1, 8), 1 / length, np.float32) + places)


@pytest.mark.parametrize("lengths", [(6, 60), (60, 6)])
def test_constants_are_those_of_the_batchs_own_shape(lengths):
    batches = [(normal(2, length, 8, seed=length),) for length in lengths]
    rule = jq.Rule(match="d/kernel", weights=W8, activations=TENSOR, static=True)
    _, made = run(Scaled(), batches, rule)
    largest = max(float(jnp.abs(x).max()) / x.shape[1] for (x,) in batches)
    scale = np.asarray(states_of(made.qvariables)["d/kernel#dot"]["scale"])
    assert scale.item() == pytest.approx(largest / 127, rel=1e-5)


class Latents(nn.Module):
    @nn.compact
    def __call__(self, x):
        latents = self.param("latents", nn.initializers.normal(1.0), (4, 8))
        q = nn.Dense(8, name="q")(jnp.broadcast_to(latents, (x.shape[0], 4, 8)))
        return nn.softmax(q @ nn.Dense(8, name="k")(x).swapaxes(-1, -2)) @ x


@pytest.mark.parametrize(
    "more", [{"algorithm": GPTQ()}, {"activations": TENSOR, "static": True}, {"scaling": AWQ()}]
)
def test_a_site_that_reads_no_data_is_refused_where_data_are_needed(more):
    rule = jq.Rule(match="[qk]/kernel", weights=W8, **more)
    with pytest.raises(jq.PlanError, match="q/kernel#dot cannot .* depends on no data"):
        run(Latents(), [(normal(2, 6, 8),)], rule)


class Shared(nn.Module):
    """One weight, read by each step of a scan."""

    @nn.compact
    def __call__(self, x):
        def step(dense, carry, _):
            return nn.tanh(dense(carry)), None

        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False}, length=3)
        return scan(nn.Dense(8, name="d"), x, None)[0]


def test_a_weight_that_the_steps_of_a_loop_share_is_refused():
    rule = jq.Rule(match="*kernel", weights=W4, algorithm=GPTQ())
    with pytest.raises(jq.PlanError, match="the steps of a loop share the weight"):
        run(Shared(), [(normal(4, 8),)], rule)


class Wide(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(16, name="a")(x)


@pytest.mark.parametrize(
    "more",
    [
        {"activations": W8, "outliers": Outliers(weights=OutlierWeights.ORIGINAL)},
        {"activations": TILES, "static": True},
    ],
)
def test_state_in_the_models_order_does_not_go_with_a_permutation(more):
    x = normal(32, 16).at[:, 3].mul(40.0)
    for order in Order:
        rule = jq.Rule(match="*kernel", weights=W4, algorithm=GPTQ(order=order), **more)
        if order is not Order.DESCENDING:
            run(Wide(), [(x,)], rule)
            continue
        with pytest.raises(jq.PlanError, match="takes its inputs in another order"):
            run(Wide(), [(x,)], rule)


def test_weights_that_are_not_finite_are_named_whatever_the_algorithm():
    x = normal(32, 16)
    variables = Wide().init(jax.random.key(0), x)
    kernel = variables["params"]["a"]["kernel"]
    variables["params"]["a"]["kernel"] = kernel.at[2, 3].set(jnp.nan)
    for more in ({"algorithm": RangeSearch()}, {"activations": TENSOR, "static": True}):
        rule = jq.Rule(match="*kernel", weights=W8, **more)
        with pytest.raises(ValueError, match="a/kernel holds NaN"):
            run(Wide(), [(x,)], rule, variables=variables)


def test_inputs_that_are_divided_go_with_no_algorithm():
    rule = jq.Rule(
        match="*kernel",
        weights=W8,
        activations=W8,
        algorithm=HQQ(),
        scaling=SmoothQuant(unfolded=True),
    )
    with pytest.raises((jq.PlanError, ValueError), match="algorithm|zero point"):
        run(Wide(), [(normal(32, 16),)], rule)


class Flagged(nn.Module):
    @nn.compact
    def __call__(self, x, double):
        return nn.Dense(8, name="d")(2 * x if double else x)


def test_flags_of_a_batch_decide_what_is_computed():
    x = normal(8, 16)
    rule = jq.Rule(match="*kernel", weights=W8, activations=TENSOR, static=True)
    scales = [
        np.asarray(states_of(made.qvariables)["d/kernel#dot"]["scale"]).item()
        for batches in ([(x, False)], [(x, True), (x[:4], True)])
        for _, made in [run(Flagged(), batches, rule)]
    ]
    assert scales[1] == pytest.approx(2 * scales[0])
    with pytest.raises(jq.PlanError, match="True makes the model compute something else"):
        run(Flagged(), [(x, False), (x, True)], rule)


class Transposed(nn.Module):
    """The contracted axis of the input is not its last."""

    @nn.compact
    def __call__(self, x):
        gain = self.param("gain", nn.initializers.ones, (1, 16, 1))
        w = self.param("w", nn.initializers.lecun_normal(), (16, 8))
        return jnp.einsum("bkt,kn->bnt", x * gain, w)


def test_an_alpha_is_searched_on_the_rows_that_the_site_multiplies():
    x = normal(4, 16, 10).at[:, 3].mul(50.0)
    model = Transposed()
    variables = model.init(jax.random.key(0), x)
    how = SmoothQuant(alpha=None)
    rule = jq.Rule(match="w", weights=W8, activations=TENSOR, scaling=how)
    plan, made = run(model, [(x,)], rule, variables=variables)
    out = jq.wrap(model, plan).apply(made.qvariables, x)
    (row,) = made.scalings
    # All 40 rows are sampled, and the inputs' range is that of the call either way.
    error = float(jnp.square(out - model.apply(variables, x)).sum())
    assert error == pytest.approx(row.loss, rel=0.05)


class Parallel(nn.Module):
    """Attention and MLP beside each other, on one norm."""

    @nn.compact
    def __call__(self, x):
        h = nn.RMSNorm(name="n")(x)

        def dense(name, width=8):
            return nn.Dense(width, name=name, use_bias=False)

        q, k, v = (dense(name)(h) for name in "qkv")
        mixed = nn.softmax(q @ k.swapaxes(-1, -2)) @ v
        wide = nn.silu(dense("gate", 16)(h)) * dense("up", 16)(h)
        return x + dense("o")(mixed) + dense("down")(wide)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Parallel(name="l")(x)


@pytest.mark.parametrize("left", ["*o/kernel", "*down/kernel"])
def test_a_group_that_reaches_beyond_what_can_be_inspected_is_judged_alone(left):
    rules = (jq.Rule(match=left), jq.Rule(match="*kernel", weights=W4, scaling=AWQ(ratios=4)))
    _, made = run(Block(), [(normal(2, 6, 8),)], *rules)
    assert made.scalings[0].fold == "l/n/scale -> l/{q,k,v,gate,up}/kernel"
    assert made.scalings[0].loss <= made.scalings[0].plain_loss
