"""The norm is the formula, also of rows far from zero and of narrow floats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.models._layer_norm import LayerNorm


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("away", [0.0, 3000.0])
def test_it_is_the_formula(dtype, away):
    x = (jax.random.normal(jax.random.key(0), (2, 3, 64)) * 40 + away).astype(dtype)
    params = {"scale": jnp.linspace(0.5, 2, 64), "bias": jnp.linspace(-1, 1, 64)}
    y = LayerNorm(epsilon=0.1).apply({"params": params}, x)
    wide = np.asarray(x, np.float64)
    centered = wide - wide.mean(-1, keepdims=True)
    normed = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 0.1)
    wanted = normed * np.asarray(params["scale"]) + np.asarray(params["bias"])
    assert y.dtype == dtype
    # The mean is rounded to 2^-24 of itself, of which the quotient is 1/40; then the output is.
    atol = (1 + away / 40) * 8 * 2.0**-24
    np.testing.assert_allclose(
        y.astype(jnp.float32), wanted, rtol=float(jnp.finfo(dtype).eps), atol=atol
    )


def test_parameters_are_held_as_asked():
    shapes = jax.eval_shape(
        LayerNorm(epsilon=0.1, param_dtype=jnp.bfloat16).init, jax.random.key(0), jnp.zeros((1, 4))
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.bfloat16)}
