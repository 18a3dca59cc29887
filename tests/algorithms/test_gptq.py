"""GPTQ against its equations in float64, and its laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.algorithms import GPTQ, gptq, Order
from jaxquant.numerics import AbsMax, Convention, decode, INT3, INT4, MinMax, UINT4
from jaxquant.qarray import dequantize, quantize_array, Scheme, schemes, Tile

# The convention MIDDLE puts a negative peak in the middle between two codes, where any rounding of
# float32 decides: it has no place where codes are compared.
HIGHEST = AbsMax(convention=Convention.HIGHEST)
G16 = Scheme(values=INT4, tile=Tile(contracted=16), range=HIGHEST)
G16_ASYMMETRIC = Scheme(values=UINT4, tile=Tile(contracted=16), range=MinMax(), zero_point=UINT4)
CHANNEL = Scheme(values=INT3, tile=Tile(contracted=None), range=HIGHEST)
RAGGED = Scheme(values=INT4, tile=Tile(contracted=28, ragged=True), range=HIGHEST)
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
        code = np.clip(np.round(u[:, i] / scale) + zero, scheme.values.lowest, scheme.values.highest)
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
    chosen = GPTQ().run(w, {"gram": gram}, G16)
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
    chosen = GPTQ(order=order).run(w, {"gram": gram}, G16)
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
    for block in (1, 7, 32, 1000):
        again = GPTQ(order=order, block=block).run(w, {"gram": gram}, scheme)
        assert (first.codes == again.codes).mean() >= SAME
