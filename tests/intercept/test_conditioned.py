"""What state does with the inputs of a site."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import Applied, inputs, LOWEST, W8, weight, wrapped
from states import COLUMNS_A16, quantized, with_state

import jaxquant as jq
from jaxquant.intercept._conditioned import along

K = 8
TENSOR = jq.Scheme(values=jq.INT8, tile=jq.PER_TENSOR, range=LOWEST)
ZERO = jq.Scheme(values=jq.INT8, tile=jq.PER_TENSOR, range=jq.MinMax(), zero_point=jq.INT8)


def _static(function, w, x, states, scheme=TENSOR, weights=W8):
    model, variables = Applied(function, w.shape), {"params": {"w": w}}
    rule = jq.Rule(match="*", weights=weights, activations=scheme, static=True)
    plan = jq.plan(model, variables, x, recipe=jq.Recipe(name="static", rules=(rule,)))
    return model, plan, variables, quantized(variables, plan, {"w#dot": states})


def test_state_has_an_axis_for_each_of_the_inputs():
    x = jnp.zeros((2, 5, 3, 4))
    part = jnp.arange(2 * 12).reshape(2, 12)
    got = along(part, x, summed=(3, 2), batch=(0,))
    assert got.shape == (2, 1, 3, 4)
    np.testing.assert_array_equal(got[:, 0], part.reshape(2, 4, 3).transpose(0, 2, 1))
    assert along(part[:, :1], x, summed=(3, 2), batch=(0,)).shape == (2, 1, 1, 1)


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_scales_are_those_that_were_given_not_those_of_the_inputs(jitted):
    x, w = inputs(4, K), weight(K, K)
    model, plan, _, tree = _static(jnp.matmul, w, x, {"scale": jnp.full(1, 2.0)})
    apply = wrapped(model, plan).apply
    got = (jax.jit(apply) if jitted else apply)(tree, x)
    # In steps of 2, ties to even; then what is beyond 127 steps is clipped.
    np.testing.assert_array_equal(got, (jnp.round(x / 2) * 2) @ w)
    far = x * 1000
    want = jnp.clip(jnp.round(far / 2), -128, 127) * 2
    np.testing.assert_array_equal(apply(tree, far), want @ w)


def test_zero_points_shift_the_codes():
    x, w = inputs(4, K) + 100, weight(K, K)
    states = {"scale": jnp.ones(1), "zero_point": jnp.full(1, -128, jnp.int8)}
    model, plan, variables, tree = _static(jnp.matmul, w, x, states, ZERO)
    want = model.apply(variables, x)
    np.testing.assert_array_equal(jq.wrap(model, plan).apply(tree, x), want)
    np.testing.assert_array_equal(jq.wrap(model, plan).apply(tree, x - 200), 0 * want)


def test_each_layer_has_a_scale_of_its_own():
    def scanned(x, w):
        return jax.lax.scan(lambda x, w: (x, x @ w), x, w)[1]

    x, w = inputs(4, K), weight(3, K, K)
    scale = jnp.array([[1.0], [2.0], [4.0]])
    model, plan, _, tree = _static(scanned, w, x, {"scale": scale})
    got = jax.jit(wrapped(model, plan).apply)(tree, x)
    want = jnp.stack([(jnp.round(x / s) * s) @ each for s, each in zip([1, 2, 4], w, strict=True)])
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("tile", [1, 2, 4])
def test_channels_may_have_scales(tile):
    x, w = inputs(4, K), weight(K, K)
    scheme = dataclasses.replace(TENSOR, tile=jq.Tile(contracted=tile, kept=None))
    scale = 2.0 ** jnp.arange(float(K // tile))
    model, plan, _, tree = _static(jnp.matmul, w, x, {"scale": scale}, scheme)
    each = jnp.repeat(scale, tile)[None]
    np.testing.assert_array_equal(
        wrapped(model, plan).apply(tree, x), (jnp.round(x / each) * each) @ w
    )


def test_one_scale_goes_with_several_contracted_axes_and_tiles_do_not():
    def function(x, w):
        return jnp.einsum("nab,bak->nk", x.reshape(4, 2, 4), w)

    x, w = inputs(4, K), weight(4, 2, K, contracted=(0, 1))
    model, plan, variables, tree = _static(function, w, x, {"scale": jnp.ones(1)})
    got = wrapped(model, plan).apply(tree, x)
    np.testing.assert_array_equal(got, model.apply(variables, x))
    scheme = dataclasses.replace(TENSOR, tile=jq.Tile(contracted=2, kept=None))
    with pytest.raises(jq.PlanError, match="static scales in 4 tiles along 2 axes"):
        _static(function, w, x, {}, scheme)


def test_smoothing_is_taken_off_before_rounding():
    x, w = inputs(4, K), weight(K, K)
    model, plan, variables, _ = _static(jnp.matmul, w, x, {"scale": jnp.ones(1)})
    s = 2.0 ** jnp.arange(float(K)) / 4
    states = {"w#dot": {"scale": jnp.ones(1), "smoothing": s}}
    # The codes of the weight as it is, so that what is computed is `round(x / s) @ w`.
    got = wrapped(model, plan).apply(quantized(variables, plan, states), x)
    np.testing.assert_array_equal(got, jnp.clip(jnp.round(x / s[None]), -128, 127) @ w)


def test_inputs_keep_their_dtype():
    x, w = inputs(4, K).astype(jnp.bfloat16), weight(K, K, contracted=(-1,)).astype(jnp.bfloat16)
    model, variables = Applied(jnp.matmul, (K, K)), {"params": {"w": w}}
    plan = jq.plan(model, variables, x, recipe=COLUMNS_A16)
    got = wrapped(model, plan).apply(with_state(variables, plan), x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, model.apply(variables, x))


def test_rounding_by_fixed_scales_is_not_differentiated():
    x, w = inputs(4, K), weight(K, K)
    model, plan, _, tree = _static(jnp.matmul, w, x, {"scale": jnp.ones(1)})
    with pytest.raises(TypeError, match="rounding has no useful gradient"):
        jax.grad(lambda x: wrapped(model, plan).apply(tree, x).sum())(x)
