"""Weights that are put together before they are used: a site for each part, and the same result."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import dequantized, inputs, W8, W8A8, W8A16, weight, wrapped
from flax import linen as nn
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jaxquant as jq

K = 8
X = inputs(6, K)
MESH = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))


class Parts(nn.Module):
    """Any function of an input and several parameters `a`, `b`, ..."""

    function: object
    shapes: tuple[tuple[int, ...], ...]

    @nn.compact
    def __call__(self, x):
        zeros = nn.initializers.zeros
        ws = [self.param(n, zeros, s) for n, s in zip("abcd", self.shapes, strict=False)]
        return self.function(x, *ws)


def _setting(function, shapes, x=X, recipe=W8A16):
    model = Parts(function, tuple(shapes))
    ws = [weight(*shape, seed=i) for i, shape in enumerate(shapes)]
    variables = {"params": dict(zip("abcd", ws, strict=False))}
    plan = jq.plan(model, jax.eval_shape(lambda: variables), x, recipe=recipe)
    return model, plan, variables, jq.quantize(variables, plan)


def cat(*ws, axis):
    return jnp.concatenate(ws, axis=axis)


def qkv(x, q, k, v):
    """Heads of a fused projection, as models write it."""
    fused = cat(q, k, v, axis=1).reshape(K, 3, 2, 3)
    q, k, v = jnp.moveaxis(jnp.einsum("nd,dphk->nphk", x, fused), 1, 0)
    return q + 2 * k + 3 * v


def scanned(x, a, b):
    def step(x, w):
        return jnp.clip(x @ w[:, :K] + x @ w[:, K:], -4, 4), None

    return lax.scan(step, x, cat(a, b, axis=2))[0]


def condition(x, a, b):
    w = cat(a, b, axis=1)
    return lax.cond(x.sum() > -1e9, lambda x, w: x @ w, lambda x, w: x @ w + 1, x, w)


def repeated(x, a, b):
    w = cat(a, b, axis=1)
    return lax.fori_loop(0, 3, lambda i, x: jnp.clip(x @ w, -4, 4), x)


@jax.custom_vjp
def plain_rule(x, w):
    return x @ w


plain_rule.defvjp(lambda x, w: (x @ w, (x, w)), lambda s, g: (g @ s[1].T, s[0].T @ g))


def shard_mapped(x, a, b):
    summed = lambda x, w: lax.psum(x @ w, "d")  # noqa: E731
    mapped = jax.shard_map(summed, mesh=MESH, in_specs=(P(None, "d"), P("d")), out_specs=P())
    return mapped(x, cat(a, b, axis=1))


SITES = ("a#dot", "b#dot", "c#dot", "d#dot")
HALF = (K, 4)
# What is computed, the shapes of a, b, ...; every part is one site, unless sites are named.
TABLE = {
    "kept": (lambda x, a, b: x @ cat(a, b, axis=1), [(K, 3), (K, 5)]),
    "kept, transposed": (lambda x, a, b: x @ cat(a, b, axis=0).T, [(3, K), (5, K)]),
    "kept, on the left": (lambda x, a, b: cat(a, b, axis=0) @ x.T, [(3, K), (5, K)]),
    "kept, weight by input": (
        lambda x, a, b: jnp.einsum("dk,nd->kn", cat(a, b, axis=1), x),
        [(K, 3), (K, 5)],
    ),
    "contracted": (lambda x, a, b: x @ cat(a, b, axis=0), [(3, 4), (5, 4)]),
    "contracted, on the left": (lambda x, a, b: cat(a, b, axis=1) @ x.T, [(4, 3), (4, 5)]),
    "batched": (
        lambda x, a, b: jnp.einsum("nd,ndk->nk", x, cat(a, b, axis=0)),
        [(2, K, 3), (4, K, 3)],
    ),
    "batched in the middle": (
        lambda x, a, b: jnp.einsum("dnk,nd->nk", cat(a, b, axis=1), x),
        [(K, 2, 3), (K, 4, 3)],
    ),
    "qkv": (qkv, [(K, 6)] * 3),
    "heads": (
        lambda x, a, b: jnp.einsum("nd,dhk->nhk", x, cat(a, b, axis=1).reshape(K, 5, 2)),
        [(K, 4), (K, 6)],
    ),
    "stacked": (lambda x, a, b: jnp.einsum("nd,sdk->nsk", x, jnp.stack([a, b])), [HALF] * 2),
    "stacked last": (
        lambda x, a, b: jnp.einsum("nd,dks->nks", x, jnp.stack([a, b], axis=-1)),
        [HALF] * 2,
    ),
    "stacked by jnp.array": (
        lambda x, a, b: jnp.einsum("nd,sdk->nsk", x, jnp.array([a, b])),
        [HALF] * 2,
    ),
    "stacked and taken apart": (
        lambda x, a, b: sum(x @ w for w in jnp.unstack(jnp.stack([a, b]))),
        [HALF] * 2,
    ),
    "indexed": (lambda x, a, b: x @ jnp.stack([a, b])[0] - x @ jnp.stack([a, b])[1], [HALF] * 2),
    "cast": (
        lambda x, a, b: x.astype(jnp.bfloat16) @ cat(a, b, axis=1).astype(jnp.bfloat16),
        [(K, 3), (K, 5)],
    ),
    "cast and contracted": (
        lambda x, a, b: x.astype(jnp.bfloat16) @ cat(a, b, axis=0).astype(jnp.bfloat16),
        [(3, 4), (5, 4)],
    ),
    "split as it was joined": (
        lambda x, a, b: sum(x @ w for w in jnp.split(cat(a, b, axis=1), 2, axis=1)),
        [HALF] * 2,
    ),
    "split elsewhere": (
        lambda x, a, b: x @ jnp.split(cat(a, b, axis=1), [2, 5], axis=1)[1],
        [HALF] * 2,
    ),
    "sliced beside": (
        lambda x, a, b: x @ cat(a, b, axis=0)[:, 1:3],
        [(3, 4), (5, 4)],
    ),
    "of three, two by two": (
        lambda x, a, b, c: x @ cat(cat(a, b, axis=1), c, axis=1),
        [(K, 3), (K, 2), (K, 1)],
    ),
    "in both directions": (
        lambda x, a, b, c: x @ cat(cat(a, b, axis=1), c, axis=0),
        [(3, 2), (3, 4), (5, 6)],
    ),
    "under jit": (lambda x, a, b: jax.jit(lambda x, w: x @ w)(x, cat(a, b, axis=1)), [HALF] * 2),
    "under remat": (
        lambda x, a, b: jax.checkpoint(lambda x, w: x @ w)(x, cat(a, b, axis=1)),
        [HALF] * 2,
    ),
    "joined under jit": (lambda x, a, b: x @ jax.jit(lambda *w: cat(*w, axis=1))(a, b), [HALF] * 2),
    "in a condition": (condition, [HALF] * 2),
    "in a loop": (repeated, [HALF] * 2),
    "custom rule": (lambda x, a, b: plain_rule(x, cat(a, b, axis=1)), [HALF] * 2),
    "scanned": (scanned, [(3, K, K)] * 2),
    "shard_map": (shard_mapped, [HALF] * 2),
    "vmapped": (
        lambda x, a, b: jax.vmap(lambda x, a, b: x @ cat(a, b, axis=-1))(x, a, b),
        [(6, K, 3), (6, K, 2)],
    ),
    "of one": (lambda x, a: x @ cat(a, axis=1), [HALF]),
    "with a constant": (
        lambda x, a: x @ cat(a, jnp.ones((K, 2)), axis=1),
        [HALF],
    ),
    "barrier": (lambda x, a, b: x @ lax.optimization_barrier(cat(a, b, axis=1)), [HALF] * 2),
    "constrained": (
        lambda x, a, b: (
            x @ lax.with_sharding_constraint(cat(a, b, axis=1), NamedSharding(MESH, P(None, "d")))
        ),
        [(K, 4), (K, 8)],
    ),
    "constrained across": (
        lambda x, a, b: (
            x @ lax.with_sharding_constraint(cat(a, b, axis=1), NamedSharding(MESH, P(None, "d")))
        ),
        [(K, 3), (K, 5)],
    ),
}
every_row = pytest.mark.parametrize("name", TABLE)


@every_row
def test_infer_equals_the_plain_model_on_dequantized_weights(name):
    function, shapes = TABLE[name]
    model, plan, _, qvariables = _setting(function, shapes)
    assert {site.path for site in plan.sites if site.reason is None} == set("abcd"[: len(shapes)])
    assert not any(site.reason for site in plan.sites if site.path in "abcd")
    want = jax.jit(model.apply)(dequantized(qvariables), X)
    got = jax.jit(wrapped(model, plan).apply)(qvariables, X)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    np.testing.assert_array_equal(got, want)


@every_row
def test_gradients_to_inputs_equal_the_plain_model(name):
    function, shapes = TABLE[name]
    model, plan, _, qvariables = _setting(function, shapes)
    loss = lambda model, variables: lambda x: jnp.square(model.apply(variables, x)).sum()  # noqa: E731
    want = jax.jit(jax.grad(loss(model, dequantized(qvariables))))(X)
    got = jax.jit(jax.grad(loss(wrapped(model, plan), qvariables)))(X)
    # Squares of values with 24 bits: sums of at most 64 of them round. In bfloat16, results do.
    step = 2.0**-7 if "cast" in name else 64 * 2.0**-23
    np.testing.assert_allclose(got, want, rtol=0, atol=step * float(jnp.abs(want).max()))


@every_row
def test_observers_see_what_each_part_multiplies(name):
    function, shapes = TABLE[name]
    model, plan, variables, _ = _setting(function, shapes)
    stats = jq.observe(model, variables, [(X,)])
    assert set(stats) == {site.site for site in plan.sites}
    if name == "contracted":
        np.testing.assert_array_equal(stats["a#dot"]["peak"], jnp.abs(X[:, :3]).max(0))
        np.testing.assert_array_equal(stats["b#dot"]["peak"], jnp.abs(X[:, 3:]).max(0))


def test_sites_are_named_after_the_parts():
    _, plan, _, _ = _setting(*TABLE["qkv"])
    assert [site.site for site in plan.sites] == ["a#dot", "b#dot", "c#dot"]
    _, plan, _, _ = _setting(lambda x, a: x @ cat(a[:, :2], a[:, 2:], axis=1), [HALF])
    assert [site.site for site in plan.sites] == ["a#dot", "a#dot.1"]


def _rounded(x):
    """Rows as int8 codes with one scale each, in float64: -128 meets the largest magnitude."""
    scale = np.abs(x).max(axis=1, keepdims=True) / 128
    return np.clip(np.round(x / scale), -128, 127) * scale


def test_activations_of_a_contracted_join_are_rounded_over_full_rows():
    """As for one weight of the whole shape: a part does not see its own slice's range."""
    x = np.asarray(inputs(6, K), np.float64) * np.linspace(1, 50, K) / 3
    model, plan, variables, qvariables = _setting(*TABLE["contracted"], recipe=W8A8)
    got = wrapped(model, plan).apply(qvariables, jnp.asarray(x, jnp.float32))
    w = np.concatenate([variables["params"][n] for n in "ab"]).astype(np.float64)
    want, apart = _rounded(x) @ w, np.concatenate([_rounded(x[:, :3]), _rounded(x[:, 3:])], 1) @ w
    tolerance = 1e-6 * np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)
    assert np.abs(want - apart).max() > 100 * tolerance


def test_each_part_is_rounded_by_its_own_rule():
    """`a` rounds rows, `b` rounds nothing, `c` is left."""
    rules = (*W8A8.rules, *W8A16.rules)
    rules = (
        dataclasses.replace(W8A8.rules[0], match="a"),
        dataclasses.replace(W8A16.rules[0], match="b"),
        jq.Rule(match="c"),
    )
    recipe = jq.Recipe(name="mixed", rules=rules)
    x = inputs(6, 9) / 3
    function = lambda x, a, b, c: x @ cat(a, b, c, axis=0)  # noqa: E731
    model, plan, variables, qvariables = _setting(function, [(3, 4)] * 3, x, recipe)
    assert not isinstance(qvariables["params"]["c"], jq.QArray)
    got = jax.jit(wrapped(model, plan).apply)(qvariables, x)
    a, b, c = (np.asarray(variables["params"][n], np.float64) for n in "abc")
    wide = np.asarray(x, np.float64)
    want = _rounded(wide)[:, :3] @ a + wide[:, 3:6] @ b + wide[:, 6:] @ c
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.abs(want).max())


def test_groups_of_activations_that_a_part_would_cut_are_refused():
    groups = dataclasses.replace(W8, tile=jq.Tile(contracted=4))
    rule = jq.Rule(match="*", weights=W8, activations=groups)
    with pytest.raises(jq.PlanError, match=r"activations of a#dot cannot be rounded.*tiles of 4"):
        _setting(*TABLE["contracted"], recipe=jq.Recipe(name="r", rules=(rule,)))


LEFT = {
    "arithmetic": (lambda x, a, b: x + cat(a, b, axis=0).sum(), [HALF] * 2, "needed as an array"),
    "mixed by a reshape": (
        lambda x, a, b: x @ cat(a, b, axis=1).reshape(2, K, K)[0],
        [(K, K)] * 2,
        "cuts tiles|mixes the 2 arrays|would break tiles",
    ),
    "a loop over them": (
        lambda x, a, b: lax.scan(lambda x, w: (x @ w, None), x, jnp.stack([a, b]))[0],
        [(K, K)] * 2,
        "scan steps through the arrays",
    ),
    "a slice at a traced place": (
        lambda x, a, b: x @ jnp.stack([a, b])[x[0, 0].astype(jnp.int32) % 2],
        [HALF] * 2,
        "needed as an array by: dynamic_slice",
    ),
    "looked up": (
        lambda x, a, b: x @ jnp.take(cat(a, b, axis=0), jnp.arange(K), axis=0),
        [(K, K)] * 2,
        "several parameters that were put together",
    ),
    "cut by shard_map": (
        lambda x, a, b: jax.shard_map(
            jnp.matmul, mesh=MESH, in_specs=(P(), P(None, "d")), out_specs=P(None, "d")
        )(x, cat(a, b, axis=1)),
        [HALF] * 2,
        "shard_map cuts the axis",
    ),
    "both sides": (
        lambda x, a, b: x @ (a @ cat(b, b, axis=1)),
        [(K, 4), (4, K)],
        "both sides of a product are parameters",
    ),
    "with activations": (
        lambda x, a, b: cat(a, x[:, :4].T, axis=0)[:, :6] @ x @ b,
        [(K, 6), HALF],
        "needed as an array by: concatenate",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_followed_is_refused_with_the_reason_or_dequantized(name):
    function, shapes, reason = LEFT[name]
    rows = inputs(3, K)

    def used(x, *ws):
        """Each parameter is the weight of a product of its own, too."""
        return function(x, *ws), [rows[:, : len(w)] @ w for w in ws]

    with pytest.raises(jq.PlanError, match=reason):
        _setting(used, shapes)
    # Those products are quantized, and what is left reads the dequantized weights.
    rules = (
        *(jq.Rule(match=f"{n}#dot", weights=W8, elsewhere="dequantize") for n in "ab"),
        jq.Rule(match="*", optional=True),
    )
    model, plan, _, qvariables = _setting(
        lambda x, *ws: ([rows[:, : len(w)] @ w for w in ws], function(x, *ws)),
        shapes,
        recipe=jq.Recipe(name="r", rules=rules),
    )
    want = jax.jit(model.apply)(dequantized(qvariables), X)
    got = jax.jit(wrapped(model, plan).apply)(qvariables, X)
    jax.tree.map(np.testing.assert_array_equal, got, want)
