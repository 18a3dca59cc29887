"""HQQ: identities, what it must beat, and what it refuses."""

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantized import normal

from jaxquant.algorithms._hqq import HQQ
from jaxquant.algorithms._matrix import assemble
from jaxquant.numerics import BFLOAT16, FLOAT16, FLOAT32, INT4, MinMax, UINT2, UINT3, UINT4
from jaxquant.qarray import (
    dequantize,
    PER_CHANNEL,
    quantize_array,
    Scheme,
    schemes,
    Tile,
)

G64 = Tile(contracted=64)


def _scheme(values=UINT4, zero=FLOAT16, *, tile=G64, scale=FLOAT16):
    return Scheme(values=values, tile=tile, range=MinMax(), zero_point=zero, scale=scale)


DEFAULT = HQQ()


def _held(w, scheme, how=DEFAULT):
    made = how.run(w, {}, scheme)
    return assemble(
        made.codes,
        made.scale,
        made.zero_point,
        shape=w.shape,
        dtype=w.dtype,
        scheme=scheme,
        contracted=(w.ndim - 1,),
        stack=tuple(range(w.ndim - 2)),
    )


def _nearest(w, scheme):
    return quantize_array(w, scheme, stack=tuple(range(w.ndim - 2)))


def _tile_error(w, q):
    """The mean magnitude of error of each tile of 64."""
    off = np.abs(np.asarray(dequantize(q)) - np.asarray(w)).astype(np.float64)
    return off.reshape(*w.shape[:-1], -1, 64).mean(axis=-1)


def _square(w, q):
    off = np.asarray(dequantize(q)).astype(np.float64) - np.asarray(w)
    return (off**2).sum() / (np.asarray(w).astype(np.float64) ** 2).sum()


SCHEMES = {
    "4 bits": _scheme(),
    "4 bits, signed": _scheme(INT4),
    "4 bits, zero points are codes": _scheme(zero=UINT4),
    "3 bits, bfloat16": _scheme(UINT3, BFLOAT16, scale=BFLOAT16),
    "2 bits": _scheme(UINT2, FLOAT32, scale=FLOAT32),
}


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_no_tile_errs_more_than_rounded_to_nearest(name, refit):
    w = normal(96, 256)
    q = _held(w, SCHEMES[name], HQQ(refit_scale=refit, round_zero=False))
    before, after = _tile_error(w, _nearest(w, SCHEMES[name])), _tile_error(w, q)
    # Means of 64 magnitudes in float32, which a choice compares.
    assert (after <= before * (1 + 64 * 2.0**-24)).all()
    # A zero point that is a code, beside a scale that stays, is the nearest one already.
    if SCHEMES[name].zero_point != UINT4 or refit:
        assert after.mean() < 0.97 * before.mean()


@pytest.mark.parametrize("name", SCHEMES)
def test_rounded_zero_points_start_from_codes_and_0_stays_near_the_grid(name):
    scheme = SCHEMES[name]
    w = normal(96, 256)
    codes = dataclasses.replace(scheme, zero_point=scheme.values)
    before, after = _tile_error(w, _nearest(w, codes)), _tile_error(w, _held(w, scheme))
    assert (after <= before * (1 + 64 * 2.0**-24)).all()
    rounded, free = (
        np.asarray(_held(w, scheme, HQQ(round_zero=b)).zero_point, np.float64)
        for b in (True, False)
    )
    off = [np.abs(zero - np.round(zero)).mean() for zero in (rounded, free)]
    assert off[0] <= off[1] / 2


@pytest.mark.parametrize("refit", [False, True])
def test_more_steps_never_err_more(refit):
    w = normal(64, 256)
    last = np.inf
    for iterations in (1, 2, 5, 20):
        now = _tile_error(
            w, _held(w, SCHEMES["2 bits"], HQQ(iterations=iterations, refit_scale=refit))
        )
        assert (now <= last * (1 + 64 * 2.0**-24)).all()
        last = now


def test_weights_on_the_grid_stay():
    w = jnp.asarray(np.random.default_rng(0).integers(0, 16, (32, 128)) - 7.0, jnp.float32)
    w = w.at[:, ::64].set(-7.0).at[:, 1::64].set(8.0)
    np.testing.assert_array_equal(dequantize(_held(w, _scheme())), w)


def test_the_error_is_at_most_092_of_rounding_in_4_bits():
    """0.909 is what the reference measures on Gaussian numbers."""
    w = normal(512, 1024)
    plain = _square(w, _nearest(w, _scheme(zero=UINT4, scale=FLOAT32)))
    assert _square(w, _held(w, _scheme())) <= 0.92 * plain


def test_scales_from_least_squares_pay_at_2_bits():
    w = normal(256, 512)
    plain, refit = (
        _square(w, _held(w, SCHEMES["2 bits"], HQQ(refit_scale=b))) for b in (False, True)
    )
    assert refit < 0.65 * plain


def test_one_step_is_the_proximal_step_written_out():
    """Of one tile, in NumPy's float64, by the equations of the reference."""
    w = np.asarray(normal(1, 64)).astype(np.float64)
    gap = (w.max() - w.min()) / 3
    zero, beta = -w.min() / gap, 10.0
    best = (np.inf, zero)
    for _ in range(4):
        codes = np.clip(np.round(w / gap + zero), 0, 3)
        off = w - (codes - zero) * gap
        best = min(best, (np.abs(off).mean(), zero))
        size = np.maximum(np.abs(off), 1e-30)
        sparse = np.sign(off) * np.maximum(size - size**-0.3 / beta, 0)
        zero = (codes - (w - sparse) / gap).mean()
        beta *= 1.01
    how = HQQ(iterations=3, round_zero=False)
    q = _held(jnp.asarray(w, jnp.float32), SCHEMES["2 bits"], how)
    assert float(q.zero_point[0, 0]) == pytest.approx(best[1], rel=1e-5)
    assert float(q.scale[0, 0]) == pytest.approx(gap, rel=1e-6)


def test_stacked_weights_are_solved_as_each_slice_is():
    w = normal(3, 32, 128) * jnp.asarray([1.0, 0.01, 30.0])[:, None, None]
    whole = HQQ().run(w, {}, _scheme())
    for i in range(3):
        own = jax.tree.map(operator.itemgetter(i), whole)
        jax.tree.map(np.testing.assert_array_equal, own, HQQ().run(w[i], {}, _scheme()))


def test_a_tile_may_span_rows_and_a_row_of_zeros_stays():
    w = normal(32, 128).at[:4].set(0.0)
    q = _held(w, _scheme(tile=Tile(contracted=64, kept=4)))
    assert q.scale.shape == q.zero_point.shape == (8, 2)
    np.testing.assert_array_equal(dequantize(q)[:4], 0)
    assert np.isfinite(np.asarray(dequantize(q))).all()


def test_it_is_compiled_once_a_shape():
    from jaxquant.algorithms._hqq import _solve

    _solve.clear_cache()
    for seed in range(3):
        HQQ().run(normal(16, 128, seed=seed), {}, _scheme())
    assert _solve._cache_size() == 1


REFUSED = [
    (Scheme(values=INT4, tile=G64), "finds zero points, and the scheme int4 g64 has none"),
    (
        Scheme(
            values=UINT4,
            tile=G64,
            range=MinMax(),
            zero_point=UINT4,
            scale=Scheme(values=INT4, tile=PER_CHANNEL),
        ),
        "holds scales as codes",
    ),
    (schemes.NF4, "has none"),
]


@pytest.mark.parametrize("scheme, message", REFUSED)
def test_what_it_cannot_solve_is_refused(scheme, message):
    with pytest.raises(ValueError, match=message):
        HQQ().run(normal(8, 128), {}, scheme)


def test_ragged_tiles_are_refused():
    with pytest.raises(ValueError, match="those of 1x96 do not fill 8x128"):
        HQQ().run(normal(8, 128), {}, _scheme(tile=Tile(contracted=96, ragged=True)))


@pytest.mark.parametrize("wrong", [dict(power=0.0), dict(beta=-1.0), dict(iterations=0)])
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match="HQQ takes 0 < power <= 1"):
        HQQ(**wrong)
