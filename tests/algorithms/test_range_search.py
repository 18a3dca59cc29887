"""Ranges by search: against all candidates in NumPy, and the laws of the objective."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.algorithms import assemble, GPTQ, Order, RangeSearch
from jaxquant.numerics import AbsMax, Convention, FLOAT16, INT3, INT4, INT8, MinMax, UINT4
from jaxquant.qarray import check_qarray, dequantize, quantize_array, Scheme, schemes, Tile
from jaxquant.qarray._quantize import quantize_with

HIGHEST, SIGNED = (AbsMax(convention=c) for c in (Convention.HIGHEST, Convention.SIGNED))
G16 = Tile(contracted=16)
HALF = Scheme(values=INT4, tile=G16, range=HIGHEST, scale=jq.BFLOAT16)
SCHEMES = {
    "highest": Scheme(values=INT4, tile=G16, range=HIGHEST),
    "signed": Scheme(values=INT4, tile=G16, range=SIGNED),
    "3 bits": Scheme(values=INT3, tile=G16),
    "8 bits, channel": Scheme(values=INT8, tile=Tile(contracted=None)),
    "zero points": Scheme(values=UINT4, tile=G16, range=MinMax(), zero_point=UINT4),
    "real zero points": Scheme(values=UINT4, tile=G16, range=MinMax(), zero_point=FLOAT16),
    "nf4": Scheme(values=jq.formats.NF4, tile=G16),
    "e2m1": Scheme(values=jq.formats.E2M1, tile=G16),
    "bfloat16 scales": HALF,
    "blocks": Scheme(values=INT4, tile=Tile(contracted=16, kept=4), range=HIGHEST),
    "ragged": Scheme(values=INT4, tile=Tile(contracted=28, ragged=True), range=HIGHEST),
}
SYMMETRIC = [name for name, scheme in SCHEMES.items() if scheme.zero_point is None]
N, K = 24, 64
CLOSE = 1e-4
"""Sums of 16 to 64 squares in float32, of values that are each a rounding or two off."""


@functools.cache
def data(seed=0):
    """Heavy-tailed weights, and mean squares of inputs of which some are large."""
    rng = np.random.default_rng(seed)
    w = rng.standard_t(3, (N, K)).astype(np.float32)
    square = np.exp(rng.normal(size=K)).astype(np.float32)
    return jnp.asarray(w), jnp.asarray(square)


def run(scheme, w=None, square=None, how=RangeSearch()):  # noqa: B008  (a frozen value)
    own = data()
    w, square = own[0] if w is None else w, own[1] if square is None else square
    return how.run(w, {"moments": {"square": square}}, scheme)


def held(chosen, scheme, shape=(N, K)):
    q = assemble(
        chosen.codes,
        chosen.scale,
        chosen.zero_point,
        offset=chosen.offset,
        shape=shape,
        dtype=np.float32,
        scheme=scheme,
        contracted=(1,),
    )
    check_qarray(q)
    return q


def tiled(x, scheme):
    """Sums over each tile, in float64."""
    n, k = x.shape
    rows, width = scheme.tile.kept or n, scheme.tile.contracted or k
    down = np.add.reduceat(np.asarray(x, np.float64), np.arange(0, n, rows), axis=0)
    return np.add.reduceat(down, np.arange(0, k, width), axis=1)


def losses(q, scheme, w=None, square=None):
    own = data()
    w, square = own[0] if w is None else w, own[1] if square is None else square
    error = np.asarray(dequantize(q), np.float64) - np.asarray(w)
    return tiled(error**2 * np.asarray(square, np.float64), scheme)


@pytest.mark.parametrize("name", SCHEMES)
def test_no_tile_errs_more_than_by_the_rule_of_its_scheme(name):
    scheme = SCHEMES[name]
    plain = losses(quantize_array(data()[0], scheme), scheme)
    found = losses(held(run(scheme), scheme), scheme)
    assert (found <= plain * (1 + CLOSE)).all()
    # 8 bits leave little to be gained.
    assert found.sum() < (0.99 if scheme.values is INT8 else 0.9) * plain.sum()


def sizes(how, scheme):
    least = how.least if scheme.values.bits >= 4 else how.least_narrow
    return np.array([1.0, *np.linspace(least, how.most, how.steps)])


def candidates(name, how):
    """Every scale and zero point that may be chosen, by their definition."""
    scheme, w = SCHEMES[name], np.asarray(data()[0])
    wide = w.reshape(N, K // 16, 16)
    low, high = np.minimum(wide.min(-1), 0), np.maximum(wide.max(-1), 0)
    if scheme.zero_point is None:
        end = 8 if name == "signed" else scheme.values.highest
        base = np.abs(wide).max(-1) / np.float32(end)
        for size in sizes(how, scheme):
            for sign in (1, -1):
                yield (base * np.float32(sign * size)).astype(scheme.scale.storage), None
        return
    for a in sizes(how, scheme):
        for b in sizes(how, scheme):
            lower, upper = low * np.float32(a), high * np.float32(b)
            scale = (upper - lower) / np.float32(15)
            zero = -lower / scale
            yield scale, zero.astype(np.float16) if name.startswith("real") else np.round(zero)


@pytest.mark.parametrize(
    "name",
    ["highest", "signed", "3 bits", "bfloat16 scales", "zero points", "real zero points"],
)
def test_it_finds_the_best_of_all_candidates(name):
    scheme, how = SCHEMES[name], RangeSearch(steps=5)
    w, square = (np.asarray(x, np.float64) for x in data())
    values, best = scheme.values, np.inf
    for scale, zero in candidates(name, how):
        each = np.repeat(np.asarray(scale, np.float64), 16, axis=1)
        middle = 0 if zero is None else np.repeat(np.asarray(zero, np.float64), 16, axis=1)
        codes = np.clip(np.round(w / each + middle), values.lowest, values.highest)
        best = np.minimum(best, tiled(((codes - middle) * each - w) ** 2 * square, scheme))
    found = losses(held(run(scheme, how=how), scheme), scheme)
    # A zero point in float16 may be rounded the other way, by up to 2 ** -8 gaps.
    np.testing.assert_allclose(found, best, rtol=0.02 if name.startswith("real") else CLOSE)


@pytest.mark.parametrize("name", SCHEMES)
def test_what_it_holds_is_what_it_counted(name):
    scheme = SCHEMES[name]
    w, q = data()[0], held(run(scheme), scheme)
    again = quantize_with(w, scheme, q.scale.astype(jnp.float32), q.zero_point, contracted=(1,))
    np.testing.assert_array_equal(np.asarray(q.codes), np.asarray(again.codes))
    assert q.scale.dtype == scheme.scale.storage


@pytest.mark.parametrize("name", ["highest", "zero points"])
def test_the_size_of_the_inputs_changes_nothing(name):
    scheme, (_, square) = SCHEMES[name], data()
    first = run(scheme)
    for factor in (2.0**-30, 2.0**20):
        again = run(scheme, square=square * factor)
        np.testing.assert_array_equal(first.codes, again.codes)
        np.testing.assert_array_equal(first.scale, again.scale)


def test_columns_that_matter_err_less():
    scheme, (w, _) = SCHEMES["3 bits"], data()
    square = jnp.ones(K).at[::4].set(1000.0)
    even, told = (held(run(scheme, square=s), scheme) for s in (jnp.ones(K), square))
    mattering = [np.square(np.asarray(dequantize(q) - w))[:, ::4].sum() for q in (even, told)]
    assert mattering[1] < 0.9 * mattering[0]


def test_an_input_that_was_never_seen_leaves_the_rule_of_the_scheme():
    scheme, (w, _) = SCHEMES["highest"], data()
    chosen = run(scheme, square=jnp.zeros(K))
    plain = quantize_array(w, scheme)
    np.testing.assert_array_equal(chosen.scale, plain.scale)
    np.testing.assert_array_equal(chosen.codes, jq.numerics.as_bytes(plain.codes))


@pytest.mark.parametrize("name", ["highest", "zero points", "nf4"])
def test_stacks_are_as_each_alone(name):
    scheme = SCHEMES[name]
    w, square = (jnp.stack([data(seed)[i] for seed in range(4)]) for i in (0, 1))
    whole = run(scheme, w.reshape(2, 2, N, K), square.reshape(2, 2, K))
    for i in range(4):
        alone = run(scheme, w[i], square[i])
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(np.asarray(a)[i // 2, i % 2], np.asarray(b))


def test_both_signs_are_tried_where_the_ends_differ():
    for name in SYMMETRIC:
        scheme = SCHEMES[name]
        below = float((np.asarray(run(scheme).scale, np.float32) < 0).mean())
        if scheme.values.lowest == -scheme.values.highest:
            assert below == 0, name
        elif scheme.values is not INT8:
            assert 0.1 < below < 0.9, name


def test_a_tile_of_zeros_stays_one():
    scheme, (w, _) = SCHEMES["highest"], data()
    chosen = run(scheme, w=w.at[:, :16].set(0.0))
    assert not np.asarray(held(chosen, scheme).codes.astype(jnp.float32))[:, :16].any()
    assert np.isfinite(np.asarray(chosen.scale)).all()


@pytest.mark.parametrize(
    "scheme",
    [
        schemes.NF4_DOUBLE,
        schemes.MXFP4,
        Scheme(values=INT4, tile=G16, centered=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("how", [RangeSearch(), GPTQ(search=RangeSearch())], ids=lambda x: x.name)
def test_scales_that_depend_on_each_other_are_refused(scheme, how):
    w, square = data()
    given = {"moments": {"square": square}, "gram": jnp.eye(K)}
    with pytest.raises(ValueError, match="chooses each scale by itself"):
        how.run(w, given, scheme)


def test_rows_that_tiles_do_not_fill_are_refused():
    scheme = Scheme(values=INT4, tile=Tile(contracted=16, kept=7, ragged=True))
    with pytest.raises(ValueError, match="whose 7 rows divide the 24 of the weight"):
        run(scheme)


def test_settings_that_mean_nothing_are_refused():
    for settings in ({"least": 0.0}, {"most": 0.5}, {"steps": 1}, {"least_narrow": 0.9}):
        with pytest.raises(ValueError, match="0 < least_narrow <= least < most"):
            RangeSearch(**settings)


@functools.cache
def gram():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((300, K // 2)) @ rng.standard_normal((K // 2, K)) / np.sqrt(K // 2)
    x = (x + 0.5 * rng.standard_normal((300, K))) * np.exp(rng.normal(size=K))
    return jnp.asarray((x.T @ x).astype(np.float32))


WITH = ["highest", "zero points", "real zero points", "nf4", "bfloat16 scales", "blocks", "ragged"]


@pytest.mark.parametrize("name", WITH)
def test_gptq_with_searched_ranges_errs_less_on_outputs(name):
    scheme, w = SCHEMES[name], data()[0]
    # Both with scales that are given, so that ranges are all that differs.
    chosen, other = (
        GPTQ(order=Order.STATIC, search=search, measured=True).run(w, {"gram": gram()}, scheme)
        for search in (RangeSearch(), None)
    )
    error = np.asarray(dequantize(held(chosen, scheme)) - w, np.float64)
    counted = np.einsum("nk,kl,nl->n", error, np.asarray(gram(), np.float64), error)
    np.testing.assert_allclose(chosen.losses, counted, rtol=1e-3)
    assert counted.sum() < 0.9 * float(other.losses.sum())


def test_gptq_with_searched_ranges_permutes_nothing():
    scheme, w = SCHEMES["highest"], data()[0]
    a, b = (
        GPTQ(order=order, search=RangeSearch()).run(w, {"gram": gram()}, scheme)
        for order in (Order.DESCENDING, Order.STATIC)
    )
    assert a.permutation is None
    np.testing.assert_array_equal(a.codes, b.codes)


@pytest.mark.parametrize("name", ["highest", "zero points"])
def test_gptq_with_searched_ranges_does_not_see_the_size_of_the_gram_matrix(name):
    scheme, w, how = SCHEMES[name], data()[0], GPTQ(search=RangeSearch())
    first = how.run(w, {"gram": gram()}, scheme)
    for factor in (2.0**-20, 2.0**12):
        again = how.run(w, {"gram": gram() * factor}, scheme)
        np.testing.assert_array_equal(first.codes, again.codes)
        np.testing.assert_array_equal(first.scale, again.scale)


def test_gptq_with_searched_ranges_takes_the_scales_of_the_search():
    scheme, w = SCHEMES["highest"], data()[0]
    diagonal = jnp.diagonal(gram())
    chosen = GPTQ(search=RangeSearch(), damping=0.0).run(w, {"gram": gram()}, scheme)
    np.testing.assert_array_equal(chosen.scale, run(scheme, square=diagonal).scale)
