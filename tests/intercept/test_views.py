"""Looking at a weight differently: what axes become, and what QArrays refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import Applied, inputs, LOWEST, W8, W8A16, weight, wrapped
from jax import lax

import jaxquant as jq

K = 8


def _site(function, shape, x, recipe=W8A16, packed=None):
    model, variables = Applied(function, shape), {"params": {"w": weight(*shape)}}
    plan = jq.plan(model, variables, x, recipe=recipe)
    qvariables = jq.quantize(variables, plan)
    want = model.apply({"params": {"w": jq.dequantize(qvariables["params"]["w"])}}, x)
    if packed:
        q = qvariables["params"]["w"]
        qvariables["params"]["w"] = jq.relayout(q, jq.Layout(packed=packed))
    got = jax.jit(wrapped(model, plan).apply)(qvariables, x)
    # Sums of at most 24 products, of which scales that are no powers of two round each.
    tolerance = 2 * 24 * np.finfo(np.float32).eps * float(jnp.abs(want).max())
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)
    return plan.sites[0]


X = inputs(4, K)
TABLE = {
    "transposed": (lambda x, w: x @ w.T, (6, K), ("kept", "contracted")),
    "heads split": (
        lambda x, w: jnp.einsum("nd,dhk->nhk", x, w.reshape(K, 2, 3)),
        (K, 6),
        ("contracted", "kept"),
    ),
    "heads merged": (
        lambda x, w: x @ w.reshape(K, 6),
        (K, 2, 3),
        ("contracted", "kept", "kept"),
    ),
    "heads merged into rows": (
        lambda x, w: x @ w.reshape(K, 6),
        (2, 4, 6),
        ("contracted", "contracted", "kept"),
    ),
    "moved to the front": (
        lambda x, w: jnp.einsum("nd,hdk->hnk", x, jnp.moveaxis(w, 1, 0)),
        (K, 2, 3),
        ("contracted", "kept", "kept"),
    ),
    "permuted and merged at once": (
        lambda x, w: x @ lax.reshape(w, (K, 6), dimensions=(1, 0, 2)),
        (2, K, 3),
        ("kept", "contracted", "kept"),
    ),
    "one of a stack": (lambda x, w: x @ w[1], (3, K, 4), ("stack", "contracted", "kept")),
    "one of a stack in the middle": (
        lambda x, w: x @ w[:, 1],
        (K, 3, 4),
        ("contracted", "stack", "kept"),
    ),
    "one of a stack at a traced place": (
        lambda x, w: x @ w[x[0, 0].astype(jnp.int32) % 3],
        (3, K, 4),
        ("stack", "contracted", "kept"),
    ),
    "with an axis of 1": (
        lambda x, w: jnp.einsum("nd,adk->nk", x, w),
        (1, K, 4),
        ("stack", "contracted", "kept"),
    ),
    "broadcast by an axis of 1": (
        lambda x, w: jnp.matmul(x[None], w[None]),
        (K, 4),
        ("contracted", "kept"),
    ),
    "columns cut": (lambda x, w: x @ w[:, 1:3], (K, 4), ("contracted", "kept")),
    "cast": (lambda x, w: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), (K, 4), None),
    "on the left": (lambda x, w: w @ x.T, (6, K), ("kept", "contracted")),
    "diagonal batch": (
        lambda x, w: jnp.einsum("nd,ndk->nk", x, w),
        (4, K, 3),
        ("batch", "contracted", "kept"),
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_roles_of_the_stored_axes_and_the_result(name):
    function, shape, expected = TABLE[name]
    site = _site(function, shape, X)
    assert site.op == "dot" and expected in (None, site.roles)


INT4 = jq.Recipe(
    name="int4",
    rules=(
        jq.Rule(
            match="*",
            weights=dataclasses.replace(W8, values=jq.INT4, range=LOWEST),
        ),
    ),
)


@pytest.mark.parametrize("name", ["transposed", "heads split", "one of a stack", "on the left"])
def test_packed_codes_are_viewed_too(name):
    function, shape, _ = TABLE[name]
    _site(function, shape, X, recipe=INT4, packed=2)


def test_a_slice_that_cuts_tiles_is_refused_by_the_plan_with_the_reason():
    rule = jq.Rule(match="*", weights=dataclasses.replace(W8, tile=jq.Tile(contracted=4)))
    function = lambda x, w: x[:, :6] @ w[:6]  # noqa: E731
    with pytest.raises(jq.PlanError, match="cuts tiles of 4"):
        _site(function, (K, 4), X, jq.Recipe(name="r", rules=(rule,)))
    spared = dataclasses.replace(rule, elsewhere="dequantize")
    _site(function, (K, 4), X, jq.Recipe(name="r", rules=(spared,)))


def test_an_axis_split_into_two_roles_is_refused():
    function = lambda x, w: jnp.einsum("nh,dhk->ndk", x[:, :2], w.reshape(K, 2, 3))  # noqa: E731
    with pytest.raises(jq.PlanError, match="axis 1 of the parameter is split into"):
        _site(function, (K, 6), X)


def test_barriers_and_moves_keep_what_is_beside_a_weight():
    def function(x, w):
        x, w = lax.optimization_barrier((x + 1, w))
        return jax.device_put((x, w))[0] @ w

    assert _site(function, (K, 4), X).roles == ("contracted", "kept")
