"""Mode simulate: the forward of inference, and gradients of what codes stand for."""

import jax
import jax.numpy as jnp
import pytest
from exact import assert_close, compiled
from flax import linen as nn
from linen_models import CASES
from quantized import same_bits
from simulated import A8, started, TENSOR4, TENSOR4_UNSIGNED, W4

import jaxquant as jq
from jaxquant.training import LSQ, PACT, Training

LEARNED = Training(weights=LSQ(), activations=LSQ())
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def _outputs(apply, variables, case):
    return compiled(lambda v, *args: apply(v, *args, **case.options()), variables, *case.args)


@every_case
def test_the_forward_is_that_of_the_converted_model_to_the_bit(case):
    """Codes by codes: sums are of whole numbers, whatever XLA does around them."""
    plan, tvariables = started(case, weights=W4, activations=A8)
    got = _outputs(jq.simulate(case.model, plan).apply, tvariables, case)
    want = _outputs(jq.wrap(case.model, plan).apply, jq.convert(tvariables, plan), case)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    assert all(same_bits(a, b) if isinstance(a, jax.Array) else a == b for a, b in pairs)


@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_weights_alone_are_multiplied_in_floats_that_round_in_their_own_order(case):
    plan, tvariables = started(case, weights=W4)
    got = _outputs(jq.simulate(case.model, plan).apply, tvariables, case)
    want = _outputs(jq.wrap(case.model, plan).apply, jq.convert(tvariables, plan), case)
    assert_close(got, want, case.dtype)


class Convolutions(nn.Module):
    """What a network for images has: windows, groups, strides, running statistics, attention."""

    @nn.compact
    def __call__(self, x, train=False):
        def norm(y):
            return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(y))

        x = norm(nn.Conv(8, (3, 3), use_bias=False, name="one")(x))
        x = norm(nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x))
        x = norm(nn.Conv(16, (2, 2), 2, name="strided")(x)).reshape(x.shape[0], -1, 16)
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        return nn.Dense(5, name="head")(x.mean(1))


IMAGES = jax.random.uniform(jax.random.key(3), (4, 6, 6, 3))


def _learned(estimator):
    """The model above: unsigned after a ReLU and for pixels, signed elsewhere."""
    of_weights = LSQ() if isinstance(estimator, PACT) else estimator
    training = Training(weights=of_weights, activations=estimator)
    common = {"weights": W4, "static": True, "training": training}
    signed = TENSOR4_UNSIGNED if isinstance(estimator, PACT) else TENSOR4
    rules = (
        jq.Rule(match="attention/out/*", activations=signed, **common),
        jq.Rule(match="head/*", activations=signed, **common),
        jq.Rule(match="*", activations=TENSOR4_UNSIGNED, **common),
    )
    model = Convolutions()
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    plan = jq.plan(model, variables, IMAGES, recipe=jq.Recipe(name="r", rules=rules))
    return model, variables, plan, jq.start_training(model, variables, plan, [(IMAGES,)])


@pytest.mark.parametrize("estimator", [LSQ(), PACT()], ids=lambda e: e.name)
def test_learned_ranges_of_convolutions_and_attention(estimator):
    model, variables, plan, tvariables = _learned(estimator)
    # Ranges so short that something lies past each end.
    own = tvariables["jaxquant"]
    tvariables["jaxquant"] = {**own, "sites": jax.tree.map(lambda x: 0.6 * x, own["sites"])}
    assert {site.op for site in plan.sites} == {"conv", "dot"}
    apply = jq.simulate(model, plan).apply

    @jax.jit
    def step(tvariables):
        y, written = apply(tvariables, IMAGES, train=True, mutable=["batch_stats"])
        return jnp.square(y).sum(), (y, written)

    gradients, (_, written) = jax.grad(step, has_aux=True)(tvariables)
    assert jax.tree.structure(written["batch_stats"]) == jax.tree.structure(
        variables["batch_stats"]
    )
    for part in (gradients["jaxquant"]["sites"], gradients["jaxquant"]["weights"]):
        assert len(part) == len(plan.sites)
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(part))
        idle = {name for name, own in part.items() if not any(map(jnp.any, own.values()))}
        # Of what is averaged before the last layer nothing need lie past the end of PACT.
        assert idle <= ({"head/kernel#dot"} if estimator == PACT() else set())
    moved = jax.tree.map(lambda x, g: x - 1e-3 * g, tvariables, gradients) | written
    got = jax.jit(apply)(moved, IMAGES)
    want = jax.jit(jq.wrap(model, plan).apply)(jq.convert(moved, plan), IMAGES)
    assert same_bits(got, want)


def test_every_layer_has_the_same_bits_on_what_it_was_given():
    """Site by site: what each module put out in both models, on inputs of the same bits."""
    model, _, plan, tvariables = _learned(LSQ())
    kept = {"capture_intermediates": True, "mutable": ["intermediates"]}
    _, trained = jq.simulate(model, plan).apply(tvariables, IMAGES, **kept)
    _, converted = jq.wrap(model, plan).apply(jq.convert(tvariables, plan), IMAGES, **kept)
    names = {"one", "depthwise", "strided", "attention", "head"}
    assert names <= set(trained["intermediates"])
    assert all(jax.tree.leaves(jax.tree.map(same_bits, trained, converted)))


def test_a_scale_that_a_vmap_would_deal_out_is_refused():
    class Vmapped(nn.Module):
        @nn.compact
        def __call__(self, x):
            kind = nn.vmap(
                nn.Conv,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=0,
                axis_size=3,
            )
            return kind(4, (3,), name="heads")(x)

    model, x = Vmapped(), jax.random.normal(jax.random.key(1), (3, 2, 5, 4))
    variables = model.init(jax.random.key(0), x)
    rule = jq.Rule(match="*", weights=W4, activations=TENSOR4, static=True, training=LEARNED)
    with pytest.raises(jq.PlanError, match="its scale of shape .* is that of several"):
        jq.plan(model, variables, x, recipe=jq.Recipe(name="r", rules=(rule,)))
