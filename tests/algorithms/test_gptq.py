"""GPTQ against its equations in float64, and its laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.algorithms import assemble, GPTQ, gptq, Order
from jaxquant.algorithms._factor import damped_factor
from jaxquant.numerics import (
    AbsMax,
    Convention,
    decode,
    INT3,
    INT4,
    MeanSquaredError,
    MinMax,
    UINT4,
)
from jaxquant.qarray import dequantize, quantize_array, Scheme, schemes, Tile

# The convention MIDDLE puts a negative peak in the middle between two codes, where any rounding of
# float32 decides: it has no place where codes are compared.
HIGHEST = AbsMax(convention=Convention.HIGHEST)
G16 = Scheme(values=INT4, tile=Tile(contracted=16), range=HIGHEST)
G16_ASYMMETRIC = Scheme(values=UINT4, tile=Tile(contracted=16), range=MinMax(), zero_point=UINT4)
CHANNEL = Scheme(values=INT3, tile=Tile(contracted=None), range=HIGHEST)
RAGGED = Scheme(values=INT4, tile=Tile(contracted=28, ragged=True), range=HIGHEST)
PAIR = Scheme(values=INT3, tile=Tile(contracted=2), range=HIGHEST)
BLOCKS = Scheme(values=INT4, tile=Tile(contracted=32, kept=4), range=HIGHEST)
RAGGED_BLOCKS = Scheme(values=INT4, tile=Tile(contracted=28, kept=7, ragged=True), range=HIGHEST)
MSE = Scheme(values=INT3, tile=Tile(contracted=32), range=MeanSquaredError(base=HIGHEST))
CENTERED = Scheme(values=INT4, tile=Tile(contracted=32), range=HIGHEST, centered=True)
REAL_ZERO = Scheme(
    values=UINT4, tile=Tile(contracted=32), range=MinMax(), zero_point=jq.formats.FLOAT16
)
SAME = 0.999
"""Share of codes that have to agree. A value within a float32 rounding of the middle between two
codes goes either way, and then changes a few others."""


@functools.cache
def _data(n=24, k=64, rows=512, seed=0):
    """A weight, and the Gram matrix of correlated inputs, some of which are large."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((rows, k // 2)) @ rng.standard_normal((k // 2, k))
    x = mixed + 0.5 * rng.standard_normal((rows, k))
    x[:, ::9] *= 8
    w = rng.standard_normal((n, k)).astype(np.float32)
    return jnp.asarray(w), jnp.asarray((x.T @ x).astype(np.float32))


def _values(chosen, scheme):
    """What the codes stand for, in the stored order of columns."""
    codes = np.asarray(decode(chosen.codes, scheme.values, jnp.float32))
    n, k = codes.shape
    scale = np.asarray(chosen.scale, np.float32)
    spread = functools.partial(np.take, indices=np.arange(k) * 1 // _width(scheme, k), axis=1)
    zero = 0 if chosen.zero_point is None else spread(np.asarray(chosen.zero_point, np.float32))
    q = (codes - zero) * spread(scale)
    if chosen.permutation is not None:
        q = q[:, np.argsort(chosen.permutation)]
    return q


def _width(scheme, k):
    return scheme.tile.contracted or k


def _reference(w, gram, scheme, order=Order.STORED, damping=0.01):
    """GPTQ of the paper in float64, column by column, with the inverse of the Gram matrix.

    Scales are made of updated columns, or beforehand. Integers only.
    """
    w, h = np.asarray(w, np.float64), np.asarray(gram, np.float64)
    n, k = w.shape
    g = _width(scheme, k)
    diagonal = h.diagonal().copy()
    mean = diagonal.mean()
    h = h + np.diag(np.where(diagonal == 0, mean, 0)) + damping * mean * np.eye(k)
    perm = np.arange(k)
    if order in (Order.DESCENDING, Order.STATIC):
        perm = np.argsort(-diagonal, kind="stable")
    if order is Order.GROUPED:
        groups = sorted(range(k // g), key=lambda i: -diagonal[i * g : i * g + g].max())
        perm = np.concatenate(
            [i * g + np.argsort(-diagonal[i * g : i * g + g], kind="stable") for i in groups]
            + [k // g * g + np.argsort(-diagonal[k // g * g :], kind="stable")]
        ).astype(int)
    h = h[perm][:, perm]
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    levels = scheme.values.highest - scheme.values.lowest

    def grid(part):
        if scheme.zero_point is None:
            return np.abs(part).max(axis=1) / scheme.values.highest, np.zeros(n)
        low, high = np.minimum(part.min(axis=1), 0), np.maximum(part.max(axis=1), 0)
        return (high - low) / levels, np.round(-low / ((high - low) / levels))

    before = [grid(w[:, i : i + g]) for i in range(0, k, g)]
    u, q = w[:, perm].copy(), np.zeros_like(w)
    for i in range(k):
        if order is Order.STATIC:
            scale, zero = before[perm[i] // g]
        elif i % g == 0:
            scale, zero = grid(u[:, i : i + g])
        code = np.clip(
            np.round(u[:, i] / scale) + zero, scheme.values.lowest, scheme.values.highest
        )
        q[:, i] = (code - zero) * scale
        u[:, i:] -= np.outer((u[:, i] - q[:, i]) / upper[i, i], upper[i, i:])
    return q[:, np.argsort(perm)]


def _share_equal(a, b, gap):
    return float((np.abs(np.asarray(a) - np.asarray(b)) < 0.01 * gap).mean())


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("scheme", [G16, G16_ASYMMETRIC, CHANNEL, RAGGED], ids=str)
def test_it_is_the_paper_s_in_float64(scheme, order):
    w, gram = _data()
    chosen = GPTQ(order=order).run(w, {"gram": gram}, scheme)
    wanted = _reference(w, gram, scheme, order)
    gap = float(np.asarray(chosen.scale).min())
    assert _share_equal(_values(chosen, scheme), wanted, gap) >= SAME


def test_losses_are_those_of_the_outputs():
    w, gram = _data()
    chosen = GPTQ(measured=True).run(w, {"gram": gram}, G16)
    for losses, q in (
        (chosen.losses, _values(chosen, G16)),
        (chosen.plain_losses, dequantize(quantize_array(w, G16))),
    ):
        error = np.asarray(w, np.float64) - q
        np.testing.assert_allclose(losses, np.einsum("nk,kl,nl->n", error, gram, error), rtol=1e-4)
    assert chosen.losses.sum() < 0.5 * chosen.plain_losses.sum()


@pytest.mark.parametrize("order", Order)
def test_it_loses_on_weights_and_wins_on_outputs(order):
    w, gram = _data()
    chosen = GPTQ(order=order, measured=True).run(w, {"gram": gram}, G16)
    plain = dequantize(quantize_array(w, G16))
    assert np.square(_values(chosen, G16) - w).sum() > np.square(plain - w).sum()
    assert float(chosen.losses.sum()) < 0.6 * float(chosen.plain_losses.sum())


@pytest.mark.parametrize("order", Order)
def test_uncorrelated_inputs_give_plain_rounding(order):
    w, _ = _data()
    gram = jnp.diag(jnp.linspace(3.0, 1.0, 64))
    for scheme in (G16, G16_ASYMMETRIC, CHANNEL, schemes.NVFP4, schemes.MXFP4, schemes.NF4):
        chosen = GPTQ(order=order).run(w, {"gram": gram}, scheme)
        plain = quantize_array(w, scheme)
        # Falling energy: the order of columns is that in which they lie.
        np.testing.assert_array_equal(
            chosen.codes, jq.numerics.as_bytes(plain.codes), err_msg=str(scheme)
        )
        wanted, got = jax.tree.leaves(plain.scale), jax.tree.leaves(chosen.scale)
        for a, b in zip(wanted, got, strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_size_of_the_gram_matrix_changes_no_code():
    w, gram = _data()
    first = GPTQ().run(w, {"gram": gram}, G16)
    for factor in (2.0**-20, 2.0**12):
        again = GPTQ().run(w, {"gram": gram * factor}, G16)
        np.testing.assert_array_equal(first.codes, again.codes)
    again = GPTQ().run(w, {"gram": gram * 3.7}, G16)
    assert (first.codes == again.codes).mean() >= SAME


@pytest.mark.parametrize("order", [Order.STORED, Order.STATIC])
@pytest.mark.parametrize("scheme", [G16, CHANNEL, RAGGED], ids=str)
def test_the_size_of_blocks_changes_no_code(scheme, order):
    w, gram = _data()
    first = GPTQ(order=order).run(w, {"gram": gram}, scheme)
    for block in (1, 48, 1000):
        again = GPTQ(order=order, block=block).run(w, {"gram": gram}, scheme)
        assert (first.codes == again.codes).mean() >= SAME


def test_the_factor_is_the_inverse_of_the_papers():
    # The paper walks by rows of `U`, the upper Cholesky factor of the inverse of H, over their
    # diagonal; those are the rows of the inverse after the columns before were eliminated. Ours
    # are the columns of `L` in `H = L^T D L`, whose inverse has those rows.
    _, gram = _data()
    h = np.asarray(gram, np.float64) + 0.01 * np.trace(gram) / 64 * np.eye(64)
    factor, _ = damped_factor(gram[::-1, ::-1], jnp.diagonal(gram).mean(), 0.01)
    unit = np.asarray(factor / jnp.diagonal(factor)[None], np.float64)
    ours = np.linalg.inv(unit[::-1, ::-1])
    inverse = np.linalg.inv(h)
    for i in range(64):
        # Rows of the recursively eliminated inverse.
        np.testing.assert_allclose(ours[i, i:], inverse[i, i:] / inverse[i, i], atol=1e-5)
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]


def test_two_columns_get_what_is_best_for_the_second_given_the_first():
    rng = np.random.default_rng(5)
    x = rng.standard_normal((100, 2)) @ np.array([[1.0, 0.9], [0.0, 0.5]])
    w = rng.standard_normal((50, 2)).astype(np.float32)
    gram = jnp.asarray((x.T @ x).astype(np.float32))
    chosen = GPTQ(damping=0.0).run(jnp.asarray(w), {"gram": gram}, PAIR)
    scale = np.asarray(chosen.scale, np.float64)
    first = np.clip(np.round(w[:, :1] / scale), -4, 3)
    np.testing.assert_array_equal(chosen.codes[:, :1], first)
    # All eight second codes, by what the outputs err.
    codes = np.stack([np.broadcast_to(first, (50, 8)), np.tile(np.arange(-4, 4), (50, 1))], axis=-1)
    error = w[:, None] - codes * scale[..., None]
    best = np.einsum("nci,ij,ncj->nc", error, x.T @ x, error).argmin(axis=1) - 4
    np.testing.assert_array_equal(chosen.codes[:, 1], best)


@pytest.mark.parametrize("order", Order)
def test_a_dead_input_is_rounded_to_nearest_and_said(order):
    w, gram = _data()
    gram = gram.at[5].set(0.0).at[:, 5].set(0.0)
    chosen = GPTQ(order=order, measured=True).run(w, {"gram": gram}, CHANNEL)
    wanted = quantize_array(w, CHANNEL)
    np.testing.assert_array_equal(chosen.codes[:, 5], wanted.codes[:, 5])
    assert chosen.notes == ("columns of inputs that were always 0, rounded to nearest: 1",)
    assert chosen.losses.sum() < chosen.plain_losses.sum()


def test_a_gram_matrix_of_rank_one_is_damped_enough():
    w, _ = _data()
    x = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    chosen = GPTQ(measured=True).run(w, {"gram": jnp.asarray(np.outer(x, x))}, G16)
    assert chosen.notes == ()
    assert chosen.losses.sum() < 0.1 * chosen.plain_losses.sum()


def test_damping_grows_until_the_factor_exists():
    w, gram = _data()
    # Not a Gram matrix: its least eigenvalue is 5 % of its mean one, below 0.
    off = np.linalg.eigvalsh(np.asarray(gram, np.float64))[0] + 0.05 * np.trace(gram) / 64
    bad = gram - off * jnp.eye(64)
    chosen = GPTQ().run(w, {"gram": bad}, G16)
    (note,) = chosen.notes
    assert note.startswith("the Gram matrix was not positive definite with damping 0.01: damped by")
    stacked = GPTQ().run(jnp.stack([w, w]), {"gram": jnp.stack([gram, bad])}, G16)
    assert "Gram matrix at 1 of the stack was not positive definite" in stacked.notes[0]


def test_without_any_factor_it_rounds_and_says_so():
    w, _ = _data()
    gram = jnp.ones((64, 64)) - 200 * jnp.eye(64)
    chosen = GPTQ().run(w, {"gram": gram}, G16)
    assert chosen.notes == (
        "no damping made the Gram matrix positive definite: rounded to nearest",
    )
    np.testing.assert_array_equal(chosen.codes, jq.numerics.as_bytes(quantize_array(w, G16).codes))


def test_no_inputs_at_all_give_plain_rounding():
    w, gram = _data()
    chosen = GPTQ().run(w, {"gram": gram * 0}, G16)
    np.testing.assert_array_equal(chosen.codes, jq.numerics.as_bytes(quantize_array(w, G16).codes))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gram": lambda g: g.at[3, 4].set(jnp.nan)}, "Gram matrix holds NaN or infinity"),
        ({"w": lambda w: w.at[3, 4].set(jnp.inf)}, "weight holds NaN or infinity"),
        ({"gram": lambda g: g[:32, :32]}, r"has a Gram matrix of shape \(64, 64\); got \(32, 32\)"),
        ({"scheme": schemes.E4M3_BLOCK}, None),
        ({"scheme": Scheme(values=INT4, tile=Tile(contracted=128))}, "Tiles of 128 do not fill"),
    ],
)
def test_bad_input_is_an_error_or_works(change, said):
    w, gram = _data()
    w = change.get("w", lambda x: x)(w)
    gram = change.get("gram", lambda x: x)(gram)
    scheme = change.get("scheme", G16)
    if said is None:
        assert GPTQ(measured=True).run(w, {"gram": gram}, scheme).losses is not None
        return
    with pytest.raises(ValueError, match=said):
        GPTQ().run(w, {"gram": gram}, scheme)


def test_missing_statistics_and_bad_settings_are_errors():
    w, _ = _data()
    with pytest.raises(ValueError, match="needs the Gram matrix of a site's inputs"):
        GPTQ().run(w, {}, G16)
    for settings in ({"damping": -1.0}, {"shrink": 1.5}, {"block": 0}):
        with pytest.raises(ValueError, match="got"):
            GPTQ(**settings)


def test_shrinking_to_the_diagonal_gives_plain_rounding():
    w, gram = _data()
    chosen = GPTQ(shrink=1.0).run(w, {"gram": gram}, G16)
    np.testing.assert_array_equal(chosen.codes, jq.numerics.as_bytes(quantize_array(w, G16).codes))


def test_stacks_are_as_each_alone_and_as_vmap():
    grams = jnp.stack([_data(seed=s)[1] for s in range(3)])
    ws = jnp.stack([_data(seed=s)[0] for s in range(3)])
    stacked = GPTQ().run(ws, {"gram": grams}, G16_ASYMMETRIC)
    mapped, _ = jax.vmap(lambda w, g: gptq(w, g, G16_ASYMMETRIC, GPTQ()))(ws, grams)
    for i in range(3):
        alone = GPTQ().run(ws[i], {"gram": grams[i]}, G16_ASYMMETRIC)
        np.testing.assert_array_equal(stacked.codes[i], alone.codes)
        np.testing.assert_array_equal(stacked.scale[i], alone.scale)
        np.testing.assert_array_equal(stacked.zero_point[i], alone.zero_point)
        assert (mapped.codes[i] == alone.codes).mean() >= SAME


def test_it_is_compiled_once_a_shape():
    w, gram = _data(n=20, k=48)
    before = gptq._cache_size()
    for seed in range(3):
        GPTQ().run(*(w + seed, {"gram": gram}), G16)
    assert gptq._cache_size() == before + 1


@pytest.mark.parametrize(
    "scheme",
    [
        schemes.NF4,
        schemes.FP4,
        schemes.MXFP4,
        schemes.NVFP4,
        schemes.NF4_DOUBLE,
        schemes.INT8_CHANNEL,
        BLOCKS,
        MSE,
        CENTERED,
        RAGGED,
        RAGGED_BLOCKS,
        REAL_ZERO,
    ],
    ids=str,
)
@pytest.mark.parametrize("order", [Order.STORED, Order.GROUPED])
def test_schemes_of_every_kind_win_on_outputs(scheme, order):
    w, gram = _data(k=128)
    chosen = GPTQ(order=order, measured=True).run(w, {"gram": gram}, scheme)
    q = assemble(
        chosen.codes,
        chosen.scale,
        chosen.zero_point,
        offset=chosen.offset,
        shape=w.shape,
        dtype=w.dtype,
        scheme=scheme,
        contracted=(1,),
    )
    error = np.asarray(w - dequantize(q), np.float64)
    # What the codes stand for is what the losses were counted of.
    losses = np.einsum("nk,kl,nl->n", error, gram, error)
    np.testing.assert_allclose(chosen.losses, losses, rtol=1e-3)
    assert losses.sum() < 0.7 * float(chosen.plain_losses.sum())
