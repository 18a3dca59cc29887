"""What a site multiplies: laid out as its weight is stored, for sites of every kind."""

import math

import convolutions
import jax
import jax.numpy as jnp
import linen_models
import moe
import numpy as np
import pytest
from exact import Applied, inputs
from flax import linen as nn
from jax import lax
from jax.extend import core
from jax.sharding import AxisType, PartitionSpec as P

import jaxquant as jq
from jaxquant.intercept import Count
from jaxquant.intercept._inputs import inputs_of

OBSERVERS = (jq.observers.Gram(), jq.observers.Moments(), jq.observers.Peak())


def _observed(function, x, w, observers=OBSERVERS):
    model = Applied(function, w.shape)
    return jq.observe(model, {"params": {"w": w}}, [(x,)], observers=observers)


def _whole(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32))


def _energy(gram, matrix):
    """Sums of squares of the outputs, by the Gram matrix: of each row of the weight's matrix."""
    return np.einsum("...nk,...kl,...nl->...n", matrix, gram, matrix)


# einsum, shapes; how the parameter is to be seen as [*stack, n, k] in stored order.
DOTS = {
    "plain": ("nk,kd->nd", (4, 3), (3, 5), "kd->dk"),
    "two contracted": ("nhk,hkd->nd", (4, 2, 3), (2, 3, 5), "hkd->d(hk)"),
    "in another order": ("nkh,hkd->nd", (4, 3, 2), (2, 3, 5), "hkd->d(hk)"),
    "outputs between": ("nhk,hdk->nd", (4, 2, 3), (2, 5, 3), "hdk->d(hk)"),
    "on the left": ("dhk,nhk->dn", (4, 2, 3), (5, 2, 3), "nhk->n(hk)"),
    "experts": ("bnk,bkd->bnd", (2, 4, 3), (2, 3, 5), "bkd->bdk"),
    "two batched": ("abnk,bakd->abnd", (2, 3, 4, 5), (3, 2, 5, 6), "bakd->(b)(a)dk"),
    "batched last": ("bnk,kdb->bnd", (2, 4, 3), (3, 5, 2), "kdb->bdk"),
}


def _matrix(w, pattern):
    before, after = pattern.replace("(b)(a)", "ba").split("->")
    flat = "(" in after
    names = after.replace("(", "").replace(")", "")
    w = np.einsum(f"{before}->{names}", w)
    return w.reshape(w.shape[0], -1) if flat else w


@pytest.mark.parametrize("name", DOTS)
def test_a_gram_fits_the_matrix_of_the_stored_weight(name):
    subscripts, x_shape, w_shape, pattern = DOTS[name]
    x, w = inputs(*x_shape), _whole(*w_shape)

    def function(x, w):
        if name == "on the left":
            return jnp.einsum("nhk,dhk->nd", w, x)
        return jnp.einsum(subscripts, x, w)

    matrix = _matrix(w, pattern)
    gram = _observed(function, x, w)["w#dot"]["gram"]
    assert gram.shape == (*matrix.shape[:-2], matrix.shape[-1], matrix.shape[-1])
    outputs = np.square(function(x, w))
    if name == "on the left":
        want = outputs.sum(1)
    elif matrix.ndim == 2:
        want = outputs.sum(0)
    else:
        want = outputs.sum(-2)
        want = np.swapaxes(want, 0, 1) if name == "two batched" else want
    np.testing.assert_array_equal(_energy(gram, matrix), want)


def test_axes_that_were_merged_in_another_order_are_put_back():
    """Stored `[h, n, d]`, used as `[(d h), n]`: the inputs' axis is split and turned."""
    x, w = inputs(4, 6), _whole(2, 5, 3)

    def function(x, w):
        return x @ w.transpose(2, 0, 1).reshape(6, 5)

    gram = _observed(function, x, w)["w#dot"]["gram"]
    matrix = np.einsum("hnd->nhd", w).reshape(5, 6)
    np.testing.assert_array_equal(_energy(gram, matrix), np.square(function(x, w)).sum(0))


def test_batched_axes_that_were_merged_are_a_stack_again():
    x, w = inputs(6, 4, 3), _whole(2, 3, 3, 5)

    def function(x, w):
        return jnp.einsum("bnk,bkd->bnd", x, w.reshape(6, 3, 5))

    gram = _observed(function, x, w)["w#dot"]["gram"]
    assert gram.shape == (2, 3, 3, 3)
    np.testing.assert_array_equal(gram.reshape(6, 3, 3), jnp.einsum("bnk,bnl->bkl", x, x))


@pytest.mark.parametrize("name", convolutions.CASES)
def test_a_gram_of_windows_fits_the_kernel(name):
    case = convolutions.CASES[name]
    x, w = inputs(*case.shapes[0]), _whole(*case.shapes[1])

    def function(x, w):
        return lax.conv_general_dilated(x, w, **case.settings)

    found = _observed(function, x, w)["w#conv"]
    out = function(x, w)
    features = case.letters[2].index("C")
    outputs = out.shape[features]
    groups = case.groups * case.batch_groups
    kernel = np.moveaxis(np.asarray(w), case.letters[1].index("O"), 0)
    kernel = kernel.reshape(outputs, -1)
    if groups > 1:
        kernel = kernel.reshape(groups, outputs // groups, -1)
    k = kernel.shape[-1]
    assert found["gram"].shape == (*kernel.shape[:-2], k, k)
    want = np.square(np.moveaxis(out, features, 0).reshape(outputs, -1)).sum(1)
    np.testing.assert_array_equal(_energy(found["gram"], kernel).reshape(-1), want)
    np.testing.assert_array_equal(found["moments"]["rows"], math.prod(out.shape) // outputs)
    np.testing.assert_array_equal(
        found["moments"]["square"], np.diagonal(found["gram"], axis1=-2, axis2=-1)
    )


@pytest.mark.parametrize("groups", [1, 2])
def test_kernels_under_vmap_are_a_stack(groups):
    x, w = inputs(3, 2, 5, 5, 4), _whole(3, 2, 3, 4 // groups, 6)

    def one(x, w):
        return lax.conv_general_dilated(
            x, w, (1, 2), "SAME", dimension_numbers=convolutions.NHWC, feature_group_count=groups
        )

    gram = _observed(jax.vmap(one), x, w)["w#conv"]["gram"]
    apart = [_observed(one, x[i], w[i])["w#conv"]["gram"] for i in range(3)]
    np.testing.assert_array_equal(gram, jnp.stack(apart))


SIZES = ((2, 0, 3, 2), (7, 0, 0, 0), (1, 1, 1, 1))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_a_ragged_product_is_a_product_for_each_expert(sizes, turned):
    """Also where the parameter is stored `[k, n, experts]`."""
    x, w = inputs(7, 5), _whole(4, 5, 3)
    stored = jnp.transpose(w, (1, 2, 0)) if turned else w

    def function(x, w):
        w = jnp.transpose(w, (2, 0, 1)) if turned else w
        return lax.ragged_dot(x, w, jnp.asarray(sizes, jnp.int32))

    observers = (*OBSERVERS, Count())
    found = _observed(function, x, stored, observers)["w#ragged_dot"]
    starts = np.cumsum((0, *sizes))
    for i, (start, size) in enumerate(zip(starts[:-1], sizes, strict=True)):
        rows = np.asarray(x[start : start + size])
        np.testing.assert_array_equal(found["gram"][i], rows.T @ rows)
        np.testing.assert_array_equal(found["moments"]["magnitude"][i], np.abs(rows).sum(0))
        np.testing.assert_array_equal(found["peak"][i], np.abs(rows).max(0, initial=0))
    np.testing.assert_array_equal(found["count"]["rows"], sizes)


def _moe(scanned):
    model = moe.Decoder(scanned=scanned)
    return model, jax.jit(moe.Decoder(scanned=True).init)(jax.random.key(0), moe.TOKENS)


def test_a_scanned_mixture_of_experts_is_observed_layer_by_layer():
    model, variables = _moe(True)
    observers = (*OBSERVERS, Count())
    stacked = jq.observe(model, variables, [(moe.TOKENS,)], observers=observers)
    flat = {"params": moe.unstacked(variables["params"])}
    single = jq.observe(_moe(False)[0], flat, [(moe.TOKENS,)], observers=observers)
    up = stacked["layers/experts/up#ragged_dot"]
    assert up["gram"].shape == (moe.LAYERS, moe.EXPERTS, moe.D, moe.D)
    chosen = moe.TOKENS.size * moe.CHOSEN
    np.testing.assert_array_equal(up["count"]["rows"].sum(-1), np.full(moe.LAYERS, chosen))
    for site, found in stacked.items():
        if not site.startswith("layers/"):
            continue
        for i in range(moe.LAYERS):
            want = single[site.replace("layers/", f"layer_{i}/")]
            for got, wanted in zip(*map(jax.tree.leaves, (found, want)), strict=True):
                np.testing.assert_allclose(got[i], wanted, rtol=1e-4, atol=1e-4)


def test_experts_that_saw_nothing_have_count_and_peak_0():
    x, w = inputs(7, 5), _whole(4, 5, 3)

    def function(x, w):
        return lax.ragged_dot(x, w, jnp.asarray([3, 0, 4, 0], jnp.int32))

    found = _observed(function, x, w)["w#ragged_dot"]
    unseen = np.asarray(found["moments"]["rows"]) == 0
    np.testing.assert_array_equal(unseen, [False, True, False, True])
    assert not np.asarray(found["peak"])[unseen].any()
    assert np.asarray(found["peak"])[~unseen].any(axis=-1).all()


def _products(jaxpr, shape):
    """Products with a result of this shape, in all bodies."""
    count = 0
    for eqn in jaxpr.eqns:
        count += eqn.primitive.name == "dot_general" and eqn.outvars[0].aval.shape == shape
        count += sum(_products(inner, shape) for inner in core.jaxprs_in_params(eqn.params))
    return count


class _Scanned(nn.Module):
    """Attention layers of which only the rows differ from what is square here."""

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + nn.MultiHeadDotProductAttention(num_heads=2)(x), None

        layers = nn.scan(
            nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return layers()(x, None)[0]


SHARING = {
    "attention": (linen_models.Attention(), "attention"),
    "scanned and rematerialized": (_Scanned(), "layers/MultiHeadDotProductAttention_0"),
}
D = linen_models.D


@pytest.mark.parametrize("name", SHARING)
def test_query_key_and_value_share_one_gram(name):
    model, _ = SHARING[name]
    x = jax.random.normal(jax.random.key(1), (2, 3, D))
    variables = model.init(jax.random.key(0), x)

    def observe(variables, x):
        return jq.observe(model, variables, [(x,)], observers=(jq.observers.Gram(),))

    stats = observe(variables, x)
    own = {part: s for s in stats for part in ("query", "key", "value", "out") if f"/{part}/" in s}
    grams = {part: stats[site]["gram"] for part, site in own.items()}
    assert grams["query"] is grams["key"] is grams["value"]
    assert grams["out"] is not grams["query"]
    # One for what all three read, and one for the output projection.
    assert _products(jax.make_jaxpr(observe)(variables, x).jaxpr, (D, D)) == 2


def test_what_is_shared_stays_shared_over_batches():
    model, _ = SHARING["attention"]
    x = jax.random.normal(jax.random.key(1), (2, 3, D))
    variables = model.init(jax.random.key(0), x)
    stats = jq.observe(
        model, variables, [(x,), (x + 1,), (x[:1],)], observers=(jq.observers.Gram(),)
    )
    query, key = (stats[f"attention/{part}/kernel#dot"]["gram"] for part in ("query", "key"))
    assert query is key
    alone = jq.observe(model, variables, [(x[:1],)], observers=(jq.observers.Gram(),))
    assert not np.array_equal(query, alone["attention/query/kernel#dot"]["gram"])


def test_one_value_read_in_two_ways_has_two_grams():
    x, w = inputs(8, 8), _whole(2, 8, 8)

    def function(x, w):
        return x @ w[0] + x.T @ w[1] + jnp.einsum("kn,kd->nd", x, w[1])

    stats = _observed(function, x, w)
    by_rows, turned, same = (stats[f"w#dot{n}"]["gram"] for n in ("", ".1", ".2"))
    np.testing.assert_array_equal(by_rows, x.T @ x)
    np.testing.assert_array_equal(turned, x @ x.T)
    np.testing.assert_array_equal(same, x @ x.T)


def test_how_weights_are_stored_keeps_no_value_from_being_shared():
    """One is stored `[k, n]`, one `[n, k]`, one is wider, one has its outputs in two axes."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            fill = nn.initializers.ones
            a, b = self.param("a", fill, (8, 8)), self.param("b", fill, (8, 8))
            c, d = self.param("c", fill, (8, 12)), self.param("d", fill, (8, 2, 3))
            return x @ a, x @ b.T, x @ c, jnp.einsum("nk,khd->nhd", x, d)

    x = inputs(4, 8)
    model = Model()
    stats = jq.observe(
        model, model.init(jax.random.key(0), x), [(x,)], observers=(jq.observers.Gram(),)
    )
    first, *rest = (part["gram"] for part in stats.values())
    assert len(rest) == 3 and all(gram is first for gram in rest)


def test_a_value_from_outside_of_a_loop_is_measured_in_each_step():
    """What a loop closes over is one value, but its statistics belong to the step's trace."""
    x, w = inputs(4, 8), _whole(3, 8, 8)

    def function(x, w):
        def step(total, w):
            return total + x @ w, None

        return x @ w[0] + lax.scan(step, jnp.zeros((4, 8)), w)[0]

    stats = _observed(function, x, w)
    gram = np.asarray(x.T @ x)
    np.testing.assert_array_equal(stats["w#dot"]["gram"], gram)
    np.testing.assert_array_equal(stats["w#dot.1"]["gram"], np.stack([gram] * 3))


def test_rows_of_an_experts_site_that_a_shard_map_deals_out_are_refused():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    x, w = inputs(8, 8), _whole(4, 8, 8)

    def body(x, w):
        x = lax.pcast(x, ("d",), to="varying")
        return lax.psum(lax.ragged_dot(x, w, jnp.asarray([8], jnp.int32)), "d")

    mapped = jax.shard_map(body, mesh=mesh, in_specs=(P(), P("d")), out_specs=P())
    with pytest.raises(jq.PlanError, match="a part of the experts, which a shard_map deals out"):
        _observed(mapped, x, w)


def test_a_lookup_multiplies_nothing():
    model, ids = linen_models.Tied(), jnp.array([[1, 2, 10]])
    variables = model.init(jax.random.key(0), ids)
    stats = jq.observe(model, variables, [(ids,)])
    assert set(stats) == {"embed/embedding#dot", "up/kernel#dot"}


def test_asking_for_what_a_lookup_multiplies_is_an_error():
    from jaxquant.intercept._evaluate import Evaluator
    from jaxquant.intercept._modes import ListSites
    from jaxquant.intercept._weight import whole

    jaxpr = jax.make_jaxpr(lambda w, i: jnp.take(w, i, axis=0, mode="clip"))
    table, ids = jnp.ones((4, 3)), jnp.asarray([1, 2])
    mode = ListSites()
    Evaluator(mode).closed(jaxpr(table, ids), [whole(table, "w"), ids], ())
    (use,) = mode.uses.values()
    with pytest.raises(ValueError, match="w#take multiplies nothing"):
        inputs_of(use)
