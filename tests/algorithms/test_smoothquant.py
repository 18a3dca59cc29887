"""SmoothQuant: its identities, and a search that never costs."""

import jax.numpy as jnp
import numpy as np
import pytest
from quantized import normal

from jaxquant.algorithms._smoothquant import scales, smoothed_losses, SmoothQuant
from jaxquant.numerics import INT8
from jaxquant.qarray import dequantize, PER_CHANNEL, PER_TENSOR, quantize_array, Scheme

K = 64
W8 = Scheme(values=INT8, tile=PER_CHANNEL)
TENSOR = Scheme(values=INT8, tile=PER_TENSOR)


def _inputs(tokens=200):
    sizes = np.exp(np.asarray(normal(K, seed=3)))
    sizes[[5, 40]] *= 30
    return normal(tokens, K) * jnp.asarray(sizes, jnp.float32)[None]


def _weights():
    return [normal(24, K, seed=1), normal(16, K, seed=2) * 0.1]


def _peak(x):
    return jnp.abs(x).max(axis=0)


def test_alpha_0_makes_the_columns_of_the_weights_peak_at_1():
    (s,) = SmoothQuant(alpha=0.0).candidates(_peak(_inputs()), _weights())
    widest = jnp.abs(jnp.concatenate(_weights()) * s[None]).max(axis=0)
    np.testing.assert_allclose(widest, 1.0, rtol=1e-6)


def test_alpha_1_makes_the_inputs_peak_at_1():
    (s,) = SmoothQuant(alpha=1.0).candidates(_peak(_inputs()), _weights())
    np.testing.assert_allclose(_peak(_inputs() / s[None]), 1.0, rtol=1e-6)


def test_alpha_a_half_makes_both_peak_alike():
    (s,) = SmoothQuant().candidates(_peak(_inputs()), _weights())
    widest = jnp.abs(jnp.concatenate(_weights()) * s[None]).max(axis=0)
    np.testing.assert_allclose(widest, _peak(_inputs() / s[None]), rtol=1e-5)


def test_all_weights_that_read_the_input_count():
    """A large column of the second weight makes its channel's scale smaller."""
    first, second = _weights()
    large = second.at[:, 7].mul(1e4)
    before = scales(_peak(_inputs()), [first, second], 0.5)
    after = scales(_peak(_inputs()), [first, large], 0.5)
    changed = np.flatnonzero(np.asarray(before != after))
    assert changed.tolist() == [7] and after[7] < before[7]


def test_products_stay_what_they_were():
    x, s = _inputs(), scales(_peak(_inputs()), _weights(), 0.5)
    for w in _weights():
        exact = np.asarray(x).astype(np.float64) @ np.asarray(w).astype(np.float64).T
        moved = (
            np.asarray(x / s[None]).astype(np.float64)
            @ np.asarray(w * s[None]).astype(np.float64).T
        )
        # Each factor is rounded once, so each product twice.
        bound = 2.0**-22 * np.abs(np.asarray(x)).astype(np.float64) @ np.abs(np.asarray(w)).T
        assert (np.abs(moved - exact) <= bound).all()


def test_dead_channels_and_dead_weights_have_finite_scales():
    peak = _peak(_inputs()).at[3].set(0.0).at[9].set(jnp.inf)
    weights = [w.at[:, 4].set(0.0) for w in _weights()]
    for alpha in (0.0, 0.5, 1.0):
        s = np.asarray(scales(peak, weights, alpha))
        assert np.isfinite(s).all() and (s >= np.float32(1e-5)).all()
        assert alpha == 0 or s[9] == 1.0


def test_stacked_layers_are_scaled_as_each_one_is():
    weights = [jnp.stack([w, 3 * w]) for w in _weights()]
    peak = jnp.stack([_peak(_inputs()), 7 * _peak(_inputs())])
    how = SmoothQuant(alpha=None, ratios=2)
    whole = how.candidates(peak, weights)
    assert whole.shape == (2, 3, K)
    for i in range(2):
        own = how.candidates(peak[i], [w[i] for w in weights])
        np.testing.assert_array_equal(whole[i], own)


def test_alphas_to_choose_from_come_with_the_identity():
    how = SmoothQuant(alpha=None, ratios=4)
    assert how.alphas == (0.2, 0.4, 0.6, 0.8) and how.searches
    found = how.candidates(_peak(_inputs()), _weights())
    np.testing.assert_array_equal(found[0], 1.0)
    np.testing.assert_array_equal(found[4], scales(_peak(_inputs()), _weights(), 0.8))
    assert SmoothQuant().alphas == (0.5,) and not SmoothQuant().searches


@pytest.mark.parametrize("activations", [W8, TENSOR], ids=["per token", "per tensor"])
def test_losses_are_those_of_products_of_rounded_sides(activations):
    x, weights = _inputs(), _weights()
    candidates = SmoothQuant(alpha=None, ratios=3).candidates(_peak(x), weights)
    losses = smoothed_losses(candidates, weights, x, [W8, W8], activations)
    for s, loss in zip(candidates, losses, strict=True):
        expected = 0.0
        for w in weights:
            sides = (
                dequantize(quantize_array(a, q))
                for a, q in ((x / s[None], activations), (w * s[None], W8))
            )
            left, right, x64, w64 = (np.asarray(a).astype(np.float64) for a in (*sides, x, w))
            expected += ((left @ right.T - x64 @ w64.T) ** 2).sum()
        # Differences of float32 sums, which are some hundredths of the sums themselves.
        assert float(loss) == pytest.approx(expected, rel=1e-3)
    assert losses[2] < 0.5 * losses[0]


def test_a_static_range_is_that_of_calibration():
    """Of sampled inputs that stay far below the peak, the error is that of the peak's gap."""
    x, weights = _inputs(), _weights()
    ones = jnp.ones((1, K))
    wide = jnp.concatenate([x, 100 * _peak(x)[None]])
    dynamic = smoothed_losses(ones, weights, x, [W8, W8], TENSOR)
    static = smoothed_losses(ones, weights, x, [W8, W8], TENSOR, static_peak=100 * _peak(x))
    held = dequantize(quantize_array(wide, TENSOR))[:-1]
    expected = sum(
        float(jnp.square(held @ dequantize(quantize_array(w, W8)).T - x @ w.T).sum())
        for w in weights
    )
    assert float(static[0]) == pytest.approx(expected, rel=1e-3)
    assert float(static[0]) > 100 * float(dynamic[0])


@pytest.mark.parametrize("wrong", [dict(alpha=-0.1), dict(alpha=1.5), dict(alpha=None, ratios=0)])
def test_an_alpha_beyond_0_and_1_is_refused(wrong):
    with pytest.raises(ValueError, match="alpha from 0 to 1, or None and at least one ratio"):
        SmoothQuant(**wrong)


def test_a_channel_that_was_never_driven_stays_as_it_is():
    weights = [jnp.ones((4, 3))]
    for alpha in (0.0, 0.5, 1.0):
        s = scales(jnp.array([0.0, 2.0, 0.5]), weights, alpha)
        assert s[0] == 1.0 and (alpha == 0.0 or s[1] > s[2])
