"""Rounding in training: codes are those of inference, derivatives those of the papers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.numerics import (
    AbsMax,
    BFLOAT16,
    Convention,
    E4M3,
    INT2,
    INT4,
    INT8,
    MeanSquaredError,
    MinMax,
    NF4,
    UINT2,
    UINT4,
    UINT8,
)
from jaxquant.qarray import dequantize, PER_TENSOR, quantize_array, Scheme, Tile
from jaxquant.training import (
    codes_of,
    first_range,
    LSQ,
    LSQPlus,
    PACT,
    range_from,
    rounded,
    Rounding,
    Start,
    straight_through,
    StraightThrough,
)

TWO_BITS = Scheme(values=INT2, tile=PER_TENSOR)
# The worked example: Qn = 2, Qp = 1, s = 0.5.
EXAMPLE = jnp.array([-2.0, -0.6, -0.2, 0.1, 0.55, 0.9, 3.0])


def values(rounding, x, learned):
    """What the codes of `x` stand for, with the derivative of training."""
    anchor, q = rounded(rounding, x, learned)
    return straight_through(lambda held: dequantize(held[0]), lambda v: v, (anchor,), (q,))


def gradients(rounding, x, learned, g):
    _, pull = jax.vjp(lambda x, learned: values(rounding, x, learned), x, learned)
    return pull(g)


def test_the_worked_example_of_lsq():
    """Esser et al. 2020, equations 3 and 5, to the digit."""
    rounding = Rounding(scheme=TWO_BITS, contracted=(0,), estimator=LSQ())
    learned = {"scale": jnp.array([0.5])}
    np.testing.assert_array_equal(
        values(rounding, EXAMPLE, learned), [-1.0, -0.5, 0.0, 0.0, 0.5, 0.5, 0.5]
    )
    dv, found = gradients(rounding, EXAMPLE, learned, jnp.ones(7))
    np.testing.assert_array_equal(dv, [0, 1, 1, 1, 0, 0, 0])
    assert float(found["scale"][0]) == pytest.approx(0.529150, abs=5e-7)
    each = [-2.0, 0.2, 0.4, -0.2, 1.0, 1.0, 1.0]
    plain = dataclasses.replace(rounding, estimator=LSQ(scaled=False))
    for i, expected in enumerate(each):
        _, found = gradients(plain, EXAMPLE, learned, jnp.eye(7)[i])
        assert float(found["scale"][0]) == pytest.approx(expected, abs=1e-6)
    start = first_range(LSQ(), EXAMPLE, TWO_BITS, (7,))["scale"]
    assert float(start[0]) == pytest.approx(2.1, abs=1e-6)


@pytest.mark.parametrize("values_in", [INT2, INT4, INT8, E4M3, NF4], ids=str)
@pytest.mark.parametrize("tile", [PER_TENSOR, Tile(contracted=None), Tile(contracted=8)], ids=str)
def test_a_learned_scale_has_the_slope_of_what_its_codes_stand_for(values_in, tile):
    """With fixed codes `v_hat` is linear in the scale; what moves codes is rounding, whose slope
    the estimator takes to be that of `v`."""
    scheme = Scheme(values=values_in, tile=tile)
    rounding = Rounding(scheme=scheme, contracted=(0,), estimator=LSQ(scaled=False))
    x = jax.random.normal(jax.random.key(0), (32, 6))
    g = jax.random.normal(jax.random.key(1), (32, 6))
    whole = rounding.tile(x.shape)
    counts = tuple(n // t for n, t in zip(x.shape, whole, strict=True))
    s = jnp.full(counts, 0.7 / max(values_in.highest, 1.0) ** 0.5, jnp.float32)
    _, found = gradients(rounding, x, {"scale": s}, g)
    full = np.kron(np.asarray(s), np.ones(whole))
    u = np.asarray(x) / full
    nearest = np.asarray(values(rounding, x, {"scale": s})) / full
    inside = (u > values_in.lowest) & (u < values_in.highest)
    each = np.asarray(g) * np.where(inside, nearest - u, nearest)
    split = each.reshape(counts[0], whole[0], counts[1], whole[1])
    np.testing.assert_allclose(found["scale"], split.sum((1, 3)), rtol=2e-4, atol=2e-4)


def test_outside_the_range_lsq_is_smooth_and_agrees_with_finite_differences():
    rounding = Rounding(scheme=TWO_BITS, contracted=(0,), estimator=LSQ(scaled=False))
    x = jnp.array([-3.0, 4.0, 5.0])

    def total(s):
        return float(values(rounding, x, {"scale": jnp.array([s])}).sum())

    _, found = gradients(rounding, x, {"scale": jnp.array([0.5])}, jnp.ones(3))
    assert float(found["scale"][0]) == pytest.approx((total(0.51) - total(0.49)) / 0.02, rel=1e-4)


@pytest.mark.parametrize("zero", [UINT4, jnp.float32], ids=["code", "real"])
def test_offsets_move_what_is_outside_alone(zero):
    """Bhalgat et al. 2020, equation 6."""
    from jaxquant.numerics import FLOAT32

    held = UINT4 if zero is UINT4 else FLOAT32
    scheme = Scheme(values=UINT4, tile=PER_TENSOR, zero_point=held, range=MinMax())
    rounding = Rounding(scheme=scheme, contracted=(0,), estimator=LSQPlus(scaled=False))
    # The offset is 4 scales, so that a zero point that is a code says the same.
    learned = {"scale": jnp.array([0.25]), "offset": jnp.array([-1.0])}
    x = jnp.array([-2.0, -1.0, 0.1, 1.3, 2.75, 4.0])
    np.testing.assert_allclose(values(rounding, x, learned), [-1, -1, 0, 1.25, 2.75, 2.75])
    dv, found = gradients(rounding, x, learned, jnp.ones(6))
    np.testing.assert_array_equal(dv, [0, 0, 1, 1, 0, 0])
    # Past the ends, which -1 and 2.75 are: 4 of 6.
    np.testing.assert_allclose(found["offset"], [4.0])
    # Q(u) - u inside; 0, 0 and 15, 15 at the ends.
    inside = (4 - 4.4) + (9 - 9.2)
    np.testing.assert_allclose(found["scale"], [inside + 30.0], rtol=1e-5)


def test_the_end_of_pact_gets_what_lies_past_it():
    """Choi et al. 2018, equation 3."""
    scheme = Scheme(values=UINT8, tile=PER_TENSOR)
    rounding = Rounding(scheme=scheme, contracted=(0,), estimator=PACT())
    learned = {"alpha": jnp.array([2.0])}
    x = jnp.array([-1.0, 0.5, 1.5, 2.0, 3.0])
    np.testing.assert_allclose(values(rounding, x, learned), [0, 0.5, 1.5, 2, 2], atol=0.004)
    g = jnp.array([1.0, 2.0, 4.0, 8.0, 16.0])
    dv, found = gradients(rounding, x, learned, g)
    np.testing.assert_array_equal(dv, [0, 2, 4, 0, 0])
    np.testing.assert_array_equal(found["alpha"], [24.0])


def test_straight_through_passes_all_or_what_is_inside():
    fixed = {"scale": jnp.array([0.5])}
    g = jnp.arange(1.0, 8.0)
    plain = Rounding(scheme=TWO_BITS, contracted=(0,))
    np.testing.assert_array_equal(gradients(plain, EXAMPLE, fixed, g)[0], g)
    clipped = dataclasses.replace(plain, estimator=StraightThrough(clipped=True))
    dv, _ = gradients(clipped, EXAMPLE, fixed, g)
    np.testing.assert_array_equal(dv, [0, 2, 3, 4, 0, 0, 0])


@pytest.mark.parametrize("transform", ["eager", "jit", "vmap", "scan", "remat"])
def test_transformations_give_the_same(transform):
    rounding = Rounding(
        scheme=Scheme(values=INT4, tile=Tile(contracted=8)), contracted=(0,), estimator=LSQ()
    )
    x = jax.random.normal(jax.random.key(0), (3, 16, 4))
    s = jnp.full((3, 2, 4), 0.3)

    def loss(x, s):
        return jnp.square(values(rounding, x, {"scale": s})).sum()

    one = jax.grad(loss, (0, 1))
    expected = [one(x[i], s[i]) for i in range(3)]
    if transform == "vmap":
        found = jax.vmap(one)(x, s)
    elif transform == "scan":

        def body(total, part):
            return total + loss(*part), None

        found = jax.grad(lambda x, s: jax.lax.scan(body, 0.0, (x, s))[0], (0, 1))(x, s)
    else:
        wrapped = {
            "eager": one,
            "jit": jax.jit(one),
            "remat": jax.grad(jax.checkpoint(loss), (0, 1)),
        }
        found = [wrapped[transform](x[i], s[i]) for i in range(3)]
        found = [jnp.stack(part) for part in zip(*found, strict=True)]
    for part, wanted in zip(found, zip(*expected, strict=True), strict=True):
        np.testing.assert_allclose(part, jnp.stack(wanted), rtol=1e-6)


def test_without_anything_learned_codes_are_those_of_quantize_array():
    x = jax.random.normal(jax.random.key(0), (64, 8))
    scheme = Scheme(values=INT4, tile=Tile(contracted=32))
    found = codes_of(x, {}, Rounding(scheme=scheme, contracted=(0,)))
    expected = quantize_array(x, scheme, contracted=(0,))
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.scale, expected.scale)


@pytest.mark.parametrize(
    ("scheme", "estimator"),
    [
        (Scheme(values=INT8, tile=Tile(contracted=None)), LSQ(start=Start.RANGE)),
        (
            Scheme(values=INT4, tile=Tile(contracted=16), range=MeanSquaredError(base=AbsMax())),
            LSQ(start=Start.RANGE),
        ),
        (
            Scheme(
                values=UINT2,
                tile=Tile(contracted=16),
                scale=BFLOAT16,
                zero_point=UINT2,
                range=MeanSquaredError(base=MinMax()),
            ),
            LSQPlus(),
        ),
    ],
    ids=str,
)
def test_from_the_range_rule_training_starts_at_the_codes_of_rounding(scheme, estimator):
    w = jax.random.normal(jax.random.key(0), (64, 8)) + 0.1
    rounding = Rounding(scheme=scheme, contracted=(0,), estimator=estimator)
    learned = first_range(estimator, w, scheme, rounding.tile(w.shape))
    found, expected = codes_of(w, learned, rounding), quantize_array(w, scheme, contracted=(0,))
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.scale, expected.scale)


def test_a_range_that_meets_its_peak_with_the_lowest_code_starts_at_a_positive_scale():
    scheme = Scheme(values=INT4, tile=PER_TENSOR, range=AbsMax(convention=Convention.SIGNED))
    for w in (EXAMPLE, -EXAMPLE):
        found = first_range(LSQ(start=Start.RANGE), w, scheme, (7,))["scale"]
        assert float(found[0]) == pytest.approx(3.0 / 8)


def test_ranges_of_activations_start_from_what_was_seen():
    mean, low, high = jnp.array([0.5]), jnp.array([-1.0]), jnp.array([3.0])
    lsq = range_from(LSQ(), Scheme(values=INT8, tile=PER_TENSOR), mean, low, high)
    assert float(lsq["scale"][0]) == pytest.approx(2 * 0.5 / 127**0.5)
    pact = range_from(PACT(), Scheme(values=UINT8, tile=PER_TENSOR), mean, low, high)
    assert float(pact["alpha"][0]) == 3.0
    scheme = Scheme(values=UINT8, tile=PER_TENSOR, zero_point=UINT8, range=MinMax())
    plus = range_from(LSQPlus(), scheme, mean, low, high)
    assert float(plus["scale"][0]) == pytest.approx(4 / 255)
    assert float(plus["offset"][0]) == pytest.approx(-1.0)
    ends = range_from(LSQ(start=Start.RANGE), Scheme(values=INT8, tile=PER_TENSOR), mean, low, high)
    assert float(ends["scale"][0]) == pytest.approx(3 / 127)
    nothing = jnp.zeros(1)
    assert float(range_from(LSQ(), TWO_BITS, nothing, nothing, nothing)["scale"][0]) == 1.0
