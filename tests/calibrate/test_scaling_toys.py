"""AWQ on decoders whose layers are scanned and whose tokens are dealt out to experts."""

import functools

import jax
import jax.numpy as jnp
import moe
import numpy as np
import pytest
from flax import linen as nn

import jaxquant as jq
from jaxquant.algorithms import AWQ, GPTQ, Order, SmoothQuant
from jaxquant.calibrate import calibrate, token_batches

INT3_G8 = jq.Scheme(values=jq.formats.INT3, tile=jq.Tile(contracted=8))


@functools.cache
def decoder(scanned):
    model = moe.Decoder(scanned=True)
    variables = model.init(jax.random.key(0), moe.TOKENS)
    params = variables["params"]
    # Channels of different size, as a trained model has: what AWQ is for.
    sizes = jnp.exp(jax.random.normal(jax.random.key(1), (moe.LAYERS, moe.D)))
    for name in ("RMSNorm_0", "RMSNorm_1"):
        params["layers"][name] = {"scale": sizes}
    tokens = np.random.default_rng(0).integers(0, moe.VOCABULARY, (8, 16))
    batches = token_batches(tokens, moe.VOCABULARY, size=4)
    if not scanned:
        model, params = moe.Decoder(scanned=False), moe.unstacked(params)
    return model, {"params": params}, batches


def run(scanned, **rule):
    model, variables, batches = decoder(scanned)
    recipe = jq.Recipe(
        name="some",
        rules=(
            jq.Rule(match="*embed*"),
            jq.Rule(match="*router*"),
            jq.Rule(match="*", weights=INT3_G8, **rule),
        ),
    )
    plan = jq.plan(model, variables, *batches[0], recipe=recipe)
    made = calibrate(model, variables, batches, plan)
    wrapped = jq.wrap(model, plan)
    outs = [
        wrapped.apply(made.qvariables, *batch) - model.apply(variables, *batch) for batch in batches
    ]
    return made, float(jnp.square(jnp.stack(outs)).mean())


@pytest.mark.parametrize("scanned", [True, False])
def test_scalings_beat_rounding(scanned):
    made, error = run(scanned, scaling=AWQ(ratios=8))
    assert made.scalings
    for row in made.scalings:
        assert row.loss <= row.plain_loss
    better = sum(row.loss < row.plain_loss for row in made.scalings)
    assert better > 0.5 * len(made.scalings)
    assert sum(r.loss for r in made.scalings) < 0.9 * sum(r.plain_loss for r in made.scalings)
    _, rounded = run(scanned)
    assert error < rounded


@pytest.mark.parametrize("scanned", [True, False])
def test_gptq_afterwards_beats_rounding_at_the_sites(scanned):
    made, _ = run(scanned, scaling=AWQ(ratios=8), algorithm=GPTQ(order=Order.STATIC))
    assert made.scalings and len(made.sites) == 6 * moe.LAYERS
    better = [row.error < row.nearest_error for row in made.sites]
    # Experts of a few rows in two blocks of 8 columns: now and then there is nothing to gain.
    assert sum(better) >= len(better) - 1
    assert sum(r.error for r in made.sites) < 0.8 * sum(r.nearest_error for r in made.sites)


def test_losses_are_of_batches_like_the_first():
    """The last batch may be shorter: what was traced for the first does not run on it."""
    model, variables, batches = decoder(True)
    short = jax.tree.map(lambda x: x[:3], batches[1])
    rules = (jq.Rule(match="*embed*"), jq.Rule(match="*router*"))
    rules += (jq.Rule(match="*", weights=INT3_G8, scaling=AWQ(ratios=4)),)
    recipe = jq.Recipe(name="some", rules=rules)
    plan = jq.plan(model, variables, *batches[0], recipe=recipe)
    made = calibrate(model, variables, [batches[0], short], plan)
    assert all(row.loss <= row.plain_loss for row in made.scalings) and made.scalings


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(8, use_bias=False, name="dense")
        return dense(jnp.sin(dense(x)))


def test_a_weight_that_is_read_twice_has_no_factors_of_its_own_at_each_place():
    model, x = Twice(), jax.random.normal(jax.random.key(0), (16, 8))
    variables = model.init(jax.random.key(1), x)
    int8 = jq.Scheme(values=jq.INT8, tile=jq.PER_CHANNEL)
    rule = jq.Rule(match="*", weights=int8, activations=int8, scaling=SmoothQuant(unfolded=True))
    plan = jq.plan(model, variables, x, recipe=jq.Recipe(name="some", rules=(rule,)))
    with pytest.raises(jq.PlanError, match="dense/kernel is read by .* and .*, which would divide"):
        calibrate(model, variables, [(x,)], plan)
