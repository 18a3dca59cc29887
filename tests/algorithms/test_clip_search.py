"""Clip search: the Gram matrix tells what inputs tell, and clipping never costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantized import normal

from jaxquant.algorithms._clip_search import clipped, ClipSearch, row_errors
from jaxquant.algorithms._matrix import assemble
from jaxquant.numerics import INT4, MinMax, UINT3, UINT4
from jaxquant.qarray import (
    check_qarray,
    dequantize,
    PER_CHANNEL,
    PER_TENSOR,
    quantize_array,
    Scheme,
    Tile,
)

K, G = 128, 32
ASYMMETRIC = Scheme(values=UINT4, tile=Tile(contracted=G), range=MinMax(), zero_point=UINT4)
SCHEMES = {
    "4 bits, asymmetric": ASYMMETRIC,
    "3 bits, asymmetric": Scheme(
        values=UINT3, tile=Tile(contracted=G), range=MinMax(), zero_point=UINT3
    ),
    "4 bits": Scheme(values=INT4, tile=Tile(contracted=G)),
    "4 bits, channel": Scheme(values=INT4, tile=PER_CHANNEL),
}


def _inputs(tokens=300, seed=1):
    """Correlated, of channels of different size."""
    mix = np.asarray(normal(K, K, seed=5)) / np.sqrt(K) + np.eye(K)
    sizes = np.exp(np.asarray(normal(K, seed=6)))
    return jnp.asarray(np.asarray(normal(tokens, K, seed=seed)) @ mix * sizes, jnp.float32)


def _weights(n=24):
    """Heavy tails, so that there is something to cut."""
    return normal(n, K, seed=2) ** 3


def _rounded(w, limits, scheme):
    return np.asarray(dequantize(quantize_array(clipped(w, limits), scheme))).astype(np.float64)


def _by_hand(w, x, scheme, factors):
    """For each row and group the factor with the least squared error of `x_g . w_g`."""
    g = scheme.tile.contracted or K
    w64, x64 = np.asarray(w).astype(np.float64), np.asarray(x).astype(np.float64)
    widest = np.abs(np.asarray(w)).reshape(len(w), -1, g).max(-1)
    errors = []
    for factor in factors:
        moved = _rounded(w, jnp.asarray(widest * np.float32(factor)), scheme) - w64
        parts = np.einsum("tgi,ngi->ngt", x64.reshape(len(x), -1, g), moved.reshape(len(w), -1, g))
        errors.append((parts**2).sum(-1))
    return widest, np.stack(errors)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_gram_matrix_tells_what_the_inputs_tell(name):
    w, x, how = _weights(), _inputs(), ClipSearch(checked=False)
    widest, errors = _by_hand(w, x, SCHEMES[name], how.factors)
    for limits in (
        how.limits(w, x.T @ x, SCHEMES[name]),
        how.limits_from_inputs(w, x, SCHEMES[name]),
    ):
        chosen = np.asarray(limits) / widest
        index = np.rint((1 - chosen) * how.grid).astype(int)
        np.testing.assert_allclose(chosen, 1 - index / how.grid, rtol=1e-6)
        found = np.take_along_axis(errors, index[None], 0)[0]
        # Sums of K products of float32, of which the errors of two candidates may differ by less.
        assert (found <= errors.min(0) * (1 + K * 2.0**-22)).all()
    assert (index > 0).mean() > 0.2


def test_candidates_go_from_1_to_055():
    assert ClipSearch().factors == pytest.approx(
        (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)
    )


@pytest.mark.parametrize("name", SCHEMES)
def test_no_row_errs_more_than_without_clipping(name):
    w, x = _weights(), _inputs()
    gram, scheme = x.T @ x, SCHEMES[name]
    wide = ClipSearch(shrink=0.05).limits(w, gram, scheme)
    limits = ClipSearch().limits(w, gram, scheme)

    def errors(limits):
        return np.asarray(
            row_errors(jnp.asarray(_rounded(w, limits, scheme), jnp.float32) - w, gram)
        )

    before, after = errors(wide), errors(limits)
    assert (after <= before * (1 + K * 2.0**-22)).all()
    assert after.sum() < 0.95 * before.sum()


def test_values_that_lie_on_the_grid_are_not_cut():
    w = jnp.asarray(np.random.default_rng(0).integers(-7, 8, (16, K)), jnp.float32)
    w = w.at[:, ::G].set(7.0).at[:, 1::G].set(-8.0)
    limits = ClipSearch().limits(w, jnp.eye(K), ASYMMETRIC)
    np.testing.assert_array_equal(clipped(w, limits), w)


def test_a_group_whose_inputs_are_zero_is_not_cut():
    x = _inputs().at[:, :G].set(0.0)
    limits = ClipSearch().limits(_weights(), x.T @ x, ASYMMETRIC)
    np.testing.assert_array_equal(limits[:, 0], jnp.abs(_weights()[:, :G]).max(axis=1))


def test_the_size_of_the_gram_matrix_does_not_matter():
    w, x = _weights(), _inputs()
    ours, other = (ClipSearch().limits(w, (x.T @ x) * size, ASYMMETRIC) for size in (1.0, 2.0**-20))
    np.testing.assert_array_equal(ours, other)


def test_stacked_weights_are_cut_as_each_slice_is():
    w = jnp.stack([_weights(), -_weights()])
    x = jnp.stack([_inputs(seed=1), _inputs(seed=8)])
    gram = jnp.einsum("stk,stl->skl", x, x)
    whole = ClipSearch().limits(w, gram, ASYMMETRIC)
    for i in range(2):
        np.testing.assert_array_equal(whole[i], ClipSearch().limits(w[i], gram[i], ASYMMETRIC))


def test_it_is_compiled_once_a_shape():
    from jaxquant.algorithms._clip_search import _limits

    _limits.clear_cache()
    for seed in range(3):
        ClipSearch().limits(normal(8, K, seed=seed), jnp.eye(K), ASYMMETRIC)
    assert _limits._cache_size() == 1


@pytest.mark.parametrize(
    "tile", [PER_TENSOR, Tile(contracted=48), Tile(contracted=48, ragged=True)]
)
def test_groups_that_are_not_of_one_row_are_refused(tile):
    scheme = Scheme(values=INT4, tile=tile)
    with pytest.raises(ValueError, match="cuts groups within rows of 128 values"):
        ClipSearch().limits(_weights(), jnp.eye(K), scheme)


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="grid >= 1"):
        ClipSearch(grid=0)
    with pytest.raises(ValueError, match="shrink <= 1"):
        ClipSearch(shrink=1.5)


def test_cut_values_meet_their_limit():
    w = jnp.asarray([[1.0, -4.0, 0.5, 3.0]])
    np.testing.assert_array_equal(clipped(w, jnp.asarray([[2.0, 1.0]])), [[1.0, -2.0, 0.5, 1.0]])
    assert jax.eval_shape(clipped, w, jnp.ones((1, 2))).shape == w.shape


def test_as_an_algorithm_it_rounds_what_it_clipped():
    rng = np.random.default_rng(8)
    w = jnp.asarray(rng.standard_t(3, (2, 6, 32)), jnp.float32)
    x = rng.standard_normal((2, 90, 32)) * rng.lognormal(size=(2, 1, 32))
    gram = jnp.asarray(np.einsum("stk,stl->skl", x, x), jnp.float32)
    scheme = Scheme(values=INT4, tile=Tile(contracted=8))
    chosen = ClipSearch().run(w, {"gram": gram}, scheme)
    q = assemble(
        chosen.codes,
        chosen.scale,
        shape=w.shape,
        dtype=w.dtype,
        scheme=scheme,
        contracted=(2,),
        stack=(0,),
    )
    check_qarray(q)
    plain = quantize_array(w, scheme, contracted=(2,), stack=(0,))
    errors = [np.asarray(row_errors(dequantize(each) - w, gram)) for each in (q, plain)]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()
    assert errors[0].sum() < 0.97 * errors[1].sum()
