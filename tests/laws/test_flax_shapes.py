"""Every shape of Flax model: planned from shapes alone, quantized offline, run, differentiated.

The plain model is given what the codes stand for, worked out in float64 by NumPy.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import assert_close
from flax import linen as nn, nnx
from flax_shapes import ROWS_OF_LINEN, ROWS_OF_NNX
from quantized import values

import jaxquant as jq

CHANNEL = jq.Scheme(values=jq.INT8, tile=jq.PER_CHANNEL)
SCHEMES = {"channel": CHANNEL, "groups": dataclasses.replace(CHANNEL, tile=jq.Tile(contracted=4))}
every_row = pytest.mark.parametrize("row", (*ROWS_OF_LINEN, *ROWS_OF_NNX), ids=str)


def _recipe(scheme, activations=None):
    rule = jq.Rule(match="*", weights=scheme, activations=activations)
    return jq.Recipe(name="r", rules=(rule,))


def _shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _setting(row, recipe):
    """The model, its variables, and a plan that has seen shapes only."""
    args = _shapes(row.args)
    if row in ROWS_OF_LINEN:
        model = row.make()
        variables = jax.jit(model.init)(jax.random.key(0), *row.args)
        abstract = jax.eval_shape(model.init, jax.random.key(0), *args)
        plan = jq.plan(model, abstract, *args, recipe=recipe)
    else:
        model = row.make()
        variables = nnx.state(model)
        abstract = nnx.eval_shape(row.make)
        plan = jq.plan(abstract, nnx.state(abstract), *args, recipe=recipe)
    return model, variables, plan


def _apply(model, variables, *args):
    """The plain model."""
    if isinstance(model, nn.Module):
        return model.apply(variables, *args)
    return nnx.merge(nnx.graphdef(model), variables, copy=True)(*args)


def _stood_for(qvariables):
    """The plain variables that codes stand for."""
    if isinstance(qvariables, nnx.State):
        kept = nnx.State({k: v for k, v in qvariables.raw_mapping.items() if k != "jaxquant"})
    else:
        kept = {k: v for k, v in qvariables.items() if k != "jaxquant"}

    def plain(x):
        return jnp.asarray(values(x).astype(np.float32)) if isinstance(x, jq.QArray) else x

    return jax.tree.map(plain, kept, is_leaf=lambda x: isinstance(x, jq.QArray))


def _wrapped(model, plan, qvariables):
    if isinstance(model, nn.Module):
        return jq.wrap(model, plan).apply
    return jq.wrap(model, plan, qvariables).apply


@every_row
def test_shapes_alone_tell_the_sites_and_their_roles(row):
    _, _, plan = _setting(row, _recipe(CHANNEL))
    assert {site.site: site.roles for site in plan.sites} == row.sites
    assert all(site.weights == CHANNEL for site in plan.sites)


@pytest.mark.parametrize("scheme", SCHEMES)
@every_row
def test_results_and_gradients_equal_the_plain_model_on_what_codes_stand_for(row, scheme):
    model, variables, plan = _setting(row, _recipe(SCHEMES[scheme]))
    qvariables = jq.quantize(variables, plan)
    apply, plain = _wrapped(model, plan, qvariables), _stood_for(qvariables)

    def outputs(function, variables):
        def run(variables, x):
            if not jnp.issubdtype(x.dtype, jnp.floating):
                return function(variables, x), None
            loss = lambda x: jnp.square(function(variables, x)).sum()  # noqa: E731
            return function(variables, x), jax.grad(loss)(x)

        return jax.jit(run)(variables, *row.args)

    want = outputs(lambda v, x: _apply(model, v, x), plain)
    assert_close(outputs(apply, qvariables), want)
    moved = jax.jit(lambda v, x: _apply(model, v, x))(variables, *row.args)
    assert jnp.abs(moved - want[0]).max() > 1e-5


@every_row
def test_rounded_activations_stay_near(row):
    model, variables, plan = _setting(row, _recipe(CHANNEL, CHANNEL))
    qvariables = jq.quantize(variables, plan)
    got = jax.jit(_wrapped(model, plan, qvariables))(qvariables, *row.args)
    want = _apply(model, _stood_for(qvariables), *row.args)
    # A row's rounding is off by at most half of 1/127 of its peak; there are up to six products.
    assert 0 < jnp.linalg.norm(got - want) < 6 / 127 * jnp.linalg.norm(want)
