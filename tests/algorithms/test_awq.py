"""AWQ: its candidates, and that no result is worse than rounding on the loss that chose it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantized import normal

from jaxquant.algorithms._awq import (
    AWQ,
    choose,
    Duo,
    rounded_at,
    scaling_losses,
    weight_size,
)
from jaxquant.intercept import mean_magnitude
from jaxquant.numerics import INT4, MinMax, UINT3, UINT4
from jaxquant.qarray import dequantize, PER_CHANNEL, quantize_array, Scheme, Tile

K, G = 128, 32
G32 = Tile(contracted=G)
W4 = Scheme(values=UINT4, tile=G32, range=MinMax(), zero_point=UINT4)
W3 = Scheme(values=UINT3, tile=G32, range=MinMax(), zero_point=UINT3)
W4_ROW = Scheme(values=INT4, tile=PER_CHANNEL)


def _inputs(tokens=256, *, outliers=True, seed=0):
    sizes = np.exp(np.asarray(normal(K, seed=3)))
    if outliers:
        sizes[[5, 40, 77]] *= 30
    return normal(tokens, K, seed=seed) * jnp.asarray(sizes, jnp.float32)[None]


def _mean(x):
    return jnp.abs(x).mean(axis=0)


def _weights():
    return [normal(48, K, seed=1), normal(16, K, seed=2) * 0.1]


def _gram(x):
    return x.T @ x


@pytest.mark.parametrize("duo", Duo)
@pytest.mark.parametrize("ratios", [4, 7, 20])
def test_the_identity_is_among_the_candidates_and_so_is_the_whole_ratio(duo, ratios):
    how = AWQ(ratios=ratios, duo=duo)
    found = how.candidates(_mean(_inputs()), _weights(), group=G)
    assert found.shape == (ratios, K) and len(how.exponents) == ratios
    np.testing.assert_array_equal(found[0], 1.0)
    assert how.exponents[0] == (0.0, False) and how.exponents[-1][0] == 1.0
    assert {divided for _, divided in how.exponents} == {
        Duo.OFF: {False},
        Duo.ON: {False, True},
        Duo.BOTH: {False, True},
    }[duo]


def test_ratios_are_even_and_both_halves_the_grid():
    assert [r for r, _ in AWQ(ratios=5, duo=Duo.OFF).exponents] == [0, 0.25, 0.5, 0.75, 1]
    assert AWQ(ratios=4, duo=Duo.ON).exponents == ((0, False), (0, True), (0.5, True), (1, True))
    both = AWQ(ratios=6, duo=Duo.BOTH).exponents
    assert both == tuple((r, d) for d in (False, True) for r in (0.0, 0.5, 1.0))


@pytest.mark.parametrize("duo", Duo)
def test_candidates_lie_around_1(duo):
    """`s / sqrt(max s * min s)`: the largest is as far above 1 as the smallest is below."""
    found = AWQ(duo=duo).candidates(_mean(_inputs()), _weights(), group=G)
    np.testing.assert_allclose(found.max(axis=1) * found.min(axis=1), 1.0, rtol=1e-5)


def test_candidates_are_powers_of_mean_magnitudes():
    mean = np.asarray(_mean(_inputs())).astype(np.float64)
    found = AWQ(ratios=5, duo=Duo.OFF).candidates(jnp.asarray(mean, jnp.float32), _weights())
    for ratio, s in zip((0, 0.25, 0.5, 0.75, 1), found, strict=True):
        expected = mean**ratio / np.sqrt((mean**ratio).max() * (mean**ratio).min())
        np.testing.assert_allclose(s, expected, rtol=1e-5)


def test_duo_divides_by_the_mean_of_weights_over_their_groups_peak():
    weights = [np.asarray(w).astype(np.float64) for w in _weights()]
    cut = [np.abs(w).reshape(len(w), -1, G) for w in weights]
    size = np.concatenate([(c / c.max(-1, keepdims=True)).reshape(-1, K) for c in cut]).mean(0)
    np.testing.assert_allclose(weight_size(_weights(), G), size, rtol=1e-4)
    mean = np.asarray(_mean(_inputs())).astype(np.float64)
    found = AWQ(ratios=4, duo=Duo.ON).candidates(
        jnp.asarray(mean, jnp.float32), _weights(), group=G
    )
    expected = mean**0.5 / (size**0.5 + 1e-4)
    expected /= np.sqrt(expected.max() * expected.min())
    np.testing.assert_allclose(found[2], expected, rtol=1e-4)


def test_the_statistic_that_it_asks_for_is_the_mean_magnitude_and_not_the_peak():
    x = _inputs()
    moments, _ = AWQ().observers
    mean = mean_magnitude(moments.measure(x))
    np.testing.assert_allclose(mean, jnp.abs(x).mean(axis=0), rtol=1e-5)
    assert (np.asarray(mean) < 0.6 * np.asarray(jnp.abs(x).max(axis=0))).all()


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, 0.0])
@pytest.mark.parametrize("duo", Duo)
def test_a_channel_without_a_finite_scale_spoils_no_other(duo, bad):
    mean = _mean(_inputs()).at[9].set(bad)
    weights = [w.at[:, 11].set(0.0) for w in _weights()]
    found = np.asarray(AWQ(duo=duo).candidates(mean, weights, group=G))
    assert np.isfinite(found).all() and (found > 0).all()
    assert (np.ptp(found[-1]) > 0) and (found[0] == 1).all()


@pytest.mark.parametrize("scheme", [W4, W3, W4_ROW], ids=str)
@pytest.mark.parametrize("duo", Duo)
@pytest.mark.parametrize("outliers", [True, False])
def test_it_is_never_worse_than_rounding_on_its_own_loss(scheme, duo, outliers):
    x, weights = _inputs(outliers=outliers), _weights()
    candidates = AWQ(duo=duo).candidates(_mean(x), weights, group=scheme.tile.contracted)
    losses = scaling_losses(candidates, weights, _gram(x), [scheme, scheme])
    found = choose(candidates, losses)
    assert found.losses[found.index] == losses.min() <= losses[0]
    plain = sum(_output_error(w, jnp.ones(K), scheme, x) for w in weights)
    now = sum(_output_error(w, found.scale, scheme, x) for w in weights)
    assert float(losses[0]) == pytest.approx(plain, rel=1e-4)
    assert now <= plain * (1 + 1e-4)
    if outliers:
        assert now < 0.8 * plain


def _output_error(w, s, scheme, x):
    """`|| x (round(w s) / s - w)^T ||^2` in float64."""
    moved = np.asarray(rounded_at(w, s, scheme)).astype(np.float64) - np.asarray(w)
    return ((np.asarray(x).astype(np.float64) @ moved.T) ** 2).sum()


def test_losses_are_errors_of_the_outputs():
    x, weights = _inputs(), _weights()
    candidates = AWQ(ratios=6, duo=Duo.BOTH).candidates(_mean(x), weights, group=G)
    losses = scaling_losses(candidates, weights, _gram(x), [W4, W3])
    for s, loss in zip(candidates, losses, strict=True):
        expected = sum(
            _output_error(w, s, scheme, x) for w, scheme in zip(weights, (W4, W3), strict=True)
        )
        assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_scales_of_1_are_plain_rounding():
    w = _weights()[0]
    plain = dequantize(quantize_array(w, W4))
    np.testing.assert_array_equal(rounded_at(w, jnp.ones(K), W4), plain)


def test_products_stay_what_they_were_before_rounding():
    x, w = _inputs(), _weights()[0]
    s = AWQ().candidates(_mean(x), [w], group=G)[-1]
    exact = np.asarray(x).astype(np.float64) @ np.asarray(w).astype(np.float64).T
    moved = (
        np.asarray(x / s[None]).astype(np.float64) @ np.asarray(w * s[None]).astype(np.float64).T
    )
    bound = 2.0**-22 * np.abs(np.asarray(x)).astype(np.float64) @ np.abs(np.asarray(w)).T
    assert (np.abs(moved - exact) <= bound).all()


def test_any_loss_may_choose():
    """Here the output of a product of two layers, of which the first is rounded."""
    x, (w, _) = _inputs(), _weights()
    after = normal(8, 48, seed=4)

    @jax.jit
    def loss(s):
        off = jax.nn.relu(x @ rounded_at(w, s, W3).T) - jax.nn.relu(x @ w.T)
        return jnp.square(off @ after.T).mean()

    candidates = AWQ(duo=Duo.OFF).candidates(_mean(x), [w])
    found = choose(candidates, jnp.stack([loss(s) for s in candidates]))
    assert found.losses.shape == (20,)
    assert float(loss(found.scale)) == pytest.approx(float(found.losses.min()))
    assert float(loss(found.scale)) < 0.9 * float(loss(jnp.ones(K)))
    assert loss._cache_size() == 1


def test_of_equals_the_identity_is_chosen_and_nan_never_is():
    candidates = jnp.stack([jnp.ones(4), jnp.full(4, 2.0), jnp.full(4, 3.0)])
    assert int(choose(candidates, jnp.asarray([1.0, 1.0, 1.0])).index) == 0
    found = choose(candidates, jnp.asarray([5.0, jnp.nan, 4.0]))
    assert int(found.index) == 2 and found.scale.tolist() == [3.0] * 4


def test_stacked_layers_are_searched_as_each_one_is():
    x = jnp.stack([_inputs(), _inputs(outliers=False, seed=7)])
    weights = [jnp.stack([w, w[::-1] * 2]) for w in _weights()]
    mean, gram = jnp.abs(x).mean(axis=1), jnp.einsum("stk,stl->skl", x, x)
    candidates = AWQ().candidates(mean, weights, group=G)
    assert candidates.shape == (2, 20, K)
    losses = scaling_losses(candidates, weights, gram, [W4, W4])
    found = choose(candidates, losses)
    assert found.index.shape == (2,) and found.scale.shape == (2, K)
    for i in range(2):
        own = AWQ().candidates(mean[i], [w[i] for w in weights], group=G)
        # Powers and sums of float32, in another order.
        np.testing.assert_allclose(candidates[i], own, rtol=1e-6)
        alone = scaling_losses(candidates[i], [w[i] for w in weights], gram[i], [W4, W4])
        np.testing.assert_allclose(losses[i], alone, rtol=1e-5)
        np.testing.assert_array_equal(found.scale[i], candidates[i][found.index[i]])


def test_all_candidates_are_one_compilation():
    from jaxquant.algorithms._awq import _scaling_losses

    _scaling_losses.clear_cache()
    for outliers in (True, False):
        x = _inputs(outliers=outliers)
        candidates = AWQ().candidates(_mean(x), _weights(), group=G)
        scaling_losses(candidates, _weights(), _gram(x), [W4, W4])
    assert _scaling_losses._cache_size() == 1


@pytest.mark.parametrize("duo, ratios", [(Duo.OFF, 1), (Duo.ON, 2), (Duo.BOTH, 3)])
def test_too_few_candidates_are_refused(duo, ratios):
    with pytest.raises(ValueError, match="of which one is the identity"):
        AWQ(duo=duo, ratios=ratios)


def test_a_short_last_group_counts_for_what_it_holds():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((5, 24)), jnp.float32)
    found = weight_size([w], 16)
    whole = weight_size([w[:, :16]], 16)
    short = weight_size([w[:, 16:]], 8)
    np.testing.assert_allclose(found, jnp.concatenate([whole, short]), rtol=1e-6)
