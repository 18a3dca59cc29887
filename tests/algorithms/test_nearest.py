"""Rounding to nearest, leaf by leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import Applied, inputs, W8, W8A16, weight
from methods import Informed

import jaxquant as jq
from jaxquant.algorithms import as_matrix, HQQ, nearest
from jaxquant.qarray import weight_error

K = 8


def _setting(w=None):
    model = Applied(jnp.matmul, (K, K))
    variables = {"params": {"w": weight(K, K) if w is None else w}}
    plan = jq.plan(model, variables, inputs(4, K), recipe=W8A16)
    return variables, plan


def test_no_value_moves_by_more_than_half_a_gap():
    w = jax.random.normal(jax.random.key(0), (K, K))
    variables, plan = _setting(w)
    q = jq.quantize(variables, plan)["params"]["w"]
    gap = q.scale
    moved = jnp.abs(jq.dequantize(q) - w)
    # LOWEST may clip the largest positive value of a channel, by at most one gap.
    inside = w <= 127 * gap
    # Dequantized values and differences round as numbers of up to 128 gaps do.
    rounding = 2 * 128 * jnp.finfo(jnp.float32).eps
    assert bool((moved <= (jnp.where(inside, 0.5, 1.0) + rounding) * gap).all())


def test_values_on_the_grid_stay():
    variables, plan = _setting()
    np.testing.assert_array_equal(
        jq.dequantize(jq.quantize(variables, plan)["params"]["w"]), weight(K, K)
    )


def test_stacked_weights_round_as_each_slice_does():
    w = jax.random.normal(jax.random.key(0), (3, K, K))
    scheme = W8A16.rules[0].weights
    whole = nearest(w, scheme, contracted=(1,), stack=(0,))
    for i in range(3):
        part = nearest(w[i], scheme, contracted=(0,))
        np.testing.assert_array_equal(whole[i].codes, part.codes)
        np.testing.assert_array_equal(whole[i].scale, part.scale)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_weight_that_is_not_finite_is_an_error_naming_it(bad):
    _, plan = _setting()
    with pytest.raises(ValueError, match="w holds NaN or infinity"):
        jq.quantize({"params": {"w": weight(K, K).at[3, 2].set(bad)}}, plan)


def test_a_missing_parameter_and_another_shape_are_errors():
    _, plan = _setting()
    with pytest.raises(ValueError, match="quantizes w, which is not among the 1 parameters"):
        jq.quantize({"params": {"v": weight(K, K)}}, plan)
    with pytest.raises(
        ValueError, match=r"w has shape \(8, 4\), but the plan was made for \(8, 8\)"
    ):
        jq.quantize({"params": {"w": weight(K, 4)}}, plan)


def test_shapes_alone_cannot_be_quantized():
    variables, plan = _setting()
    shapes = jax.eval_shape(lambda: {**variables, "batch_stats": {"mean": jnp.ones(3)}})
    with pytest.raises((ValueError, TypeError)):
        jq.quantize(shapes, plan)


class Lazy:
    """An array that is read from somewhere when it is asked for."""

    reads: list[str] = []

    def __init__(self, name, array):
        self.name, self.array = name, array
        self.shape, self.dtype = array.shape, array.dtype

    def __array__(self, dtype=None, copy=None):
        Lazy.reads.append(self.name)
        return np.asarray(self.array, dtype)


def test_lazy_leaves_are_read_once_and_one_at_a_time():
    variables, plan = _setting()
    Lazy.reads.clear()
    done = []
    lazy = {
        "params": {"w": Lazy("w", weight(K, K))},
        "batch_stats": {"mean": Lazy("mean", np.ones(3, np.float32))},
    }
    qvariables = jq.quantize(lazy, plan, progress=done.append)
    assert sorted(Lazy.reads) == ["mean", "w"] and done == ["w"]
    assert isinstance(qvariables["batch_stats"]["mean"], jax.Array)
    np.testing.assert_array_equal(
        qvariables["params"]["w"].codes, jq.quantize(variables, plan)["params"]["w"].codes
    )


def test_an_account_measures_what_was_made():
    w = jax.random.normal(jax.random.key(0), (K, K))
    variables, plan = _setting(w)
    qvariables, account = jq.quantize(variables, plan, account=True)
    q = qvariables["params"]["w"]
    assert account.plan == plan and account.errors == (("w", weight_error(w, q)),)
    plain = jq.quantize(variables, plan)
    jax.tree.map(np.testing.assert_array_equal, qvariables, plain)


@pytest.mark.parametrize("size", [1e30, 1e-30])
@pytest.mark.parametrize("account", [False, True])
def test_squares_past_the_ends_of_float32_are_no_reason_to_refuse(size, account):
    variables, plan = _setting(weight(K, K) * size)
    made = jq.quantize(variables, plan, account=account)
    q = (made[0] if account else made)["params"]["w"]
    np.testing.assert_allclose(jq.dequantize(q), weight(K, K) * size, rtol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_an_account_of_what_is_not_finite_is_refused(bad):
    _, plan = _setting()
    with pytest.raises(ValueError, match="w holds NaN or infinity"):
        jq.quantize({"params": {"w": weight(K, K).at[3, 2].set(bad)}}, plan, account=True)


@pytest.mark.parametrize("values", [jq.INT8, jq.INT4, jq.E4M3])
def test_the_loop_gives_the_codes_of_nearest(values):
    w = jax.random.normal(jax.random.key(0), (K, K))
    scheme = jq.Scheme(values=values, tile=jq.Tile(contracted=4))
    recipe = jq.Recipe(name="any", rules=(jq.Rule(match="*", weights=scheme),))
    model = Applied(jnp.matmul, (K, K))
    variables = {"params": {"w": w}}
    plan = jq.plan(model, variables, inputs(4, K), recipe=recipe)
    q = jq.quantize(variables, plan)["params"]["w"]
    expected = nearest(w, scheme, contracted=(0,))
    assert (q.codes.dtype, q.codes.committed) == (values.storage, False)
    assert q.codes.dtype == expected.codes.dtype
    np.testing.assert_array_equal(q.codes, expected.codes)
    np.testing.assert_array_equal(q.scale, expected.scale)


def test_a_plan_that_needs_data_is_refused():
    variables = {"params": {"w": weight(K, K)}}
    rule = jq.Rule(match="*", weights=W8, algorithm=Informed())
    recipe = jq.Recipe(name="mine", rules=(rule,))
    plan = jq.plan(Applied(jnp.matmul, (K, K)), variables, inputs(4, K), recipe=recipe)
    with pytest.raises(ValueError, match="'mine' needs data at 1 sites, w#dot .*calibrate"):
        jq.quantize(variables, plan)


def test_an_algorithm_that_needs_no_data_chooses_the_codes():
    scheme = jq.Scheme(
        values=jq.INT4, tile=jq.Tile(contracted=8), range=jq.MinMax(), zero_point=jq.FLOAT16
    )
    w = jax.random.normal(jax.random.key(0), (2, 16, 3, 4))

    def function(x, w):
        return jax.lax.scan(lambda x, w: (x, jnp.einsum("nk,kab->nab", x, w)), x, w)[1]

    variables, x = {"params": {"w": w}}, inputs(4, 16)
    # It begins where rounding does.
    how, trees = HQQ(round_zero=False), []
    for algorithm in (None, how):
        rule = jq.Rule(match="*", weights=scheme, algorithm=algorithm)
        recipe = jq.Recipe(name="r", rules=(rule,))
        plan = jq.plan(Applied(function, w.shape), variables, x, recipe=recipe)
        trees.append(jq.quantize(variables, plan, account=True))
    (plain, _), (tree, account) = trees
    q = tree["params"]["w"]
    made = how.run(as_matrix(w, contracted=(1,), stack=(0,)), {}, scheme)
    np.testing.assert_array_equal(as_matrix(q.codes, contracted=(1,), stack=(0,)), made.codes)
    np.testing.assert_array_equal(as_matrix(q.scale, contracted=(1,), stack=(0,)), made.scale)
    assert account.by_path["w"] == weight_error(w, q)
    errors = [jnp.abs(jq.dequantize(t["params"]["w"]) - w).mean() for t in (plain, tree)]
    assert errors[1] < errors[0]
    spoiled = {"params": {"w": w.at[0, 0, 0, 0].set(jnp.nan)}}
    with pytest.raises(ValueError, match="w holds NaN or infinity"):
        jq.quantize(spoiled, plan)
